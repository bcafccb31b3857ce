"""`export --push_to_hub` against a Hub of the test's own, without a network; and every way in which it is refused."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cca_ds import export as entry
from tests.support.hub_server import TOKEN, HubRepository, HubServer
from tests.support.trained_run import trained_run

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def run_folder() -> Path:
    return trained_run()


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """huggingface_hub in this process talks to the test's Hub; it reads its variables when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def push(run_folder: Path, output: Path, name: str, *flags: str) -> int:
    return entry.main(["--run", str(run_folder), "--output", str(output), "--push_to_hub", name, *flags])


def test_a_model_is_pushed_and_its_card_runs_as_written(run_folder, hub, tmp_path):
    """Both in processes of their own, by the variables that a user sets."""
    report = {"metrics": {"fid": 0.15}, "notes": [], "reference": "/home/ada/real.npz",
              "samples": {"path": "/home/ada/s.npz", "images": 1800, "height": 8, "width": 8},
              "sampler": {"guidance_scale": 0.0, "top_k": 0, "top_p": 1.0, "weights": "/home/ada/runs/3"},
              "protocol": {"evaluator": "ADM", "network": "digits", "published_weights": None}}  # fmt: skip
    (tmp_path / "scores.json").write_text(json.dumps(report))
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    flags = ["--run", run_folder, "--output", tmp_path / "out" / "model.safetensors", "--push_to_hub", "digits-cca",
             "--metrics", tmp_path / "scores.json"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "cca_ds.export", *map(str, flags)], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/ada/digits-cca (private)" in done.stdout
    (name,), repository = hub.repositories, hub.repositories["ada/digits-cca"]
    assert name == "ada/digits-cca" and repository.private and repository.messages == ["digits, step 2"]
    assert sorted(repository.files) == sorted(FILES)
    for file in FILES:
        assert repository.files[file] == (tmp_path / "out" / file).read_bytes(), file

    card = repository.files["README.md"].decode()
    assert "/home" not in card and str(run_folder) not in card and str(tmp_path) not in card
    assert "| FID | 0.150 |" in card and "1,800 images of 8 x 8 px" in card and "s = 0, top-k 0, top-p 1" in card
    config = json.loads(repository.files["config.json"])
    assert (config["model_type"], config["preset"], config["n_layer"]) == ("llamagen", "digits", 4)

    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'hf_hub_download("ada/digits-cca", "model.safetensors")' in example
    ran = subprocess.run([sys.executable, "-c", example], env=environment, cwd=tmp_path, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "samples.png").stat().st_size > 200
    assert "GET /ada/digits-cca/resolve/main/model.safetensors" in hub.requests


def refused(capsys, run_folder: Path, output: Path, name: str, *flags: str, code: int = 2) -> str:
    capsys.readouterr()
    assert push(run_folder, output, name, *flags) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "/s]" not in line]  # bars apart
    assert len(lines) == 1, lines
    return lines[0]


def test_public_is_asked_for(run_folder, here, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    assert push(run_folder, output, "ada/open", "--public") == 0
    assert "(public)" in capsys.readouterr().out and not here.repositories["ada/open"].private
    message = refused(capsys, run_folder, tmp_path / "again" / "model.safetensors", "ada/open")
    assert "everybody can read" in message and "--public" in message
    assert not (tmp_path / "again").exists()
    here.repositories["ada/closed"] = HubRepository(private=True)
    assert push(run_folder, output, "ada/closed", "--public") == 0  # what is private stays so
    assert "(private)" in capsys.readouterr().out and here.repositories["ada/closed"].private
    assert entry.main(["--run", str(run_folder), "--output", str(tmp_path / "p.safetensors"), "--public"]) == 2
    assert "--public goes with --push_to_hub NAME" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b/c", "a--b", ".a", "ada/model.git", "https://huggingface.co/ada/model"])
def test_malformed_names(run_folder, here, tmp_path, capsys, name):
    message = refused(capsys, run_folder, tmp_path / "out" / "m.safetensors", name)
    assert f"--push_to_hub {name}: not a name of a repository" in message
    assert not here.requests and not (tmp_path / "out").exists()


def test_what_the_hub_refuses_before_anything_is_written(run_folder, here, monkeypatch, tmp_path, capsys):
    output = tmp_path / "out" / "m.safetensors"
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "does not accept the token (401)" in refused(capsys, run_folder, output, "ada/m")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token; log in by `hf auth login`" in refused(capsys, run_folder, output, "ada/m")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, run_folder, output, "ada/m")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    here.fail["GET /api/whoami"] = 503
    assert "fails (503" in refused(capsys, run_folder, output, "ada/m", code=1)
    assert "--layout safetensors, not llamagen" in refused(capsys, run_folder, output, "ada/m", "--layout", "llamagen")
    with socket.socket() as unused:  # a port that nothing answers on
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "cannot be reached" in refused(capsys, run_folder, output, "ada/m", code=1)
    assert not output.parent.exists() and not here.repositories


@pytest.mark.parametrize(
    ("request_", "status", "expected", "code"),
    [
        ("POST /api/repos/create", 403, "the token may not write there (403", 2),
        ("POST /api/models/ada/m/commit", 403, "the token may not write there (403", 2),
        ("POST /api/models/ada/m/commit", 500, "fails (500", 1),
        ("PUT /lfs/", 413, "refused by the Hub (413", 2),
    ],
)
def test_what_fails_later_leaves_the_file_and_says_so(run_folder, here, tmp_path, capsys, request_, status, expected,
                                                      code):  # fmt: skip
    here.fail[request_] = status
    output = tmp_path / "m.safetensors"
    message = refused(capsys, run_folder, output, "m", code=code)
    assert expected in message and f"{output} is written, the same command sends it again" in message
    here.fail.clear()
    assert push(run_folder, output, "m") == 0
    assert here.repositories["ada/m"].files["m.safetensors"] == output.read_bytes()


def test_anothers_namespace(run_folder, here, tmp_path, capsys):
    assert "may not write there (403: You don't have the rights" in refused(
        capsys, run_folder, tmp_path / "m.safetensors", "eve/m"
    )


def test_the_card_names_only_models_of_the_hub_as_its_base():
    from cca_ds.models import FAMILIES
    from cca_ds.models.model_card import model_card

    def header(family: str, base: str | None) -> dict:
        return yaml.safe_load(model_card("x", FAMILIES[family], "name: x", base=base).split("---\n")[1])

    assert header("llamagen", "c2i_3B_384.pt")["base_model"] == "FoundationVision/LlamaGen"
    assert header("var", "var_d36.pth")["base_model"] == "FoundationVision/var"
    for base in ("digits_base.safetensors", "runs", None):
        assert "base_model" not in header("llamagen", base)
