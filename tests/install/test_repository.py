"""Files that tools outside the package read agree with it."""

import re

import yaml

import cca_ds
from tests.install.machines import ROOT


def test_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cca_ds.__version__
    assert f"## {cca_ds.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_image_has_the_toolkit_and_the_files_that_it_names():
    """The CUDA of the image is the one that the locked PyTorch is built with on PyPI; 2.13 has 13.0."""
    text = (ROOT / "Dockerfile").read_text()
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().split()
    assert re.search(r"^FROM nvidia/cuda:13\.0\.\d+-devel-", text, re.M)
    for source in re.findall(r"^COPY (\S+)", text, re.M):
        assert (ROOT / source).exists()


def test_the_page_for_contributors_names_files_that_exist():
    for path in re.findall(r"`((?:cca_ds|tests)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / path).exists(), path
