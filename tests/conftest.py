"""Fixtures shared by all tests: the recorded numbers, the device, and a small thread pool."""

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
torch.backends.cudnn.allow_tf32 = False  # the recorded numbers are float32's


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the original programs."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_configs(golden: Path) -> dict:
    """Shapes of the recorded tiny models, `configs.json`."""
    return json.loads((golden / "configs.json").read_text())


@pytest.fixture(scope="session")
def device() -> str:
    """The device that the device-independent tests run on: a GPU where one is at hand."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` selects what a GPU changes: every test that asks for the device."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
