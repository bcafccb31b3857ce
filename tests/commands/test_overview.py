"""`python -m cca_ds`: the commands, the keys of a recipe, the version."""

import json
import subprocess
import sys

import pytest

import cca_ds
from cca_ds.__main__ import COMMANDS, main
from cca_ds.config.deepspeed_file import SHIPPED, read_ds_config
from cca_ds.config.recipes import ConfigError
from cca_ds.ops.build_record import kernels_built
from cca_ds.ops.library import backend
from tests.support.processor_time import run_measured, torch_imports


def test_it_lists_the_commands_and_the_kernels(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  cca-{name} " in shown for name in COMMANDS)
    assert f"cca_ds {cca_ds.__version__}: {kernels_built()}" in shown
    assert {"cuda": "CUDA and", "cpp": "C++", "torch": "no"}[backend()] in kernels_built()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_and_has_a_version(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"cca_ds {cca_ds.__version__}\n"


def test_keys_by_a_part_of_their_name(capsys):
    assert main(["config", "learning_rate"]) == 0
    assert capsys.readouterr().out.startswith("| `optimizer.learning_rate` | number | `1e-05` | > 0, ≤ 10 |")
    assert main(["config", "nonsense"]) == 2
    assert capsys.readouterr().err == "cca_ds config: no key's name contains nonsense\n"


def test_an_unknown_command_is_one_line(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "cca_ds: trian is not a command; there are encode, train, export, sample, evaluate, choose, plan, config\n"
    )


def test_the_package_is_imported_at_once():
    assert min(run_measured("-c", "import cca_ds")[1] for _ in range(3)) < 0.07 * torch_imports()


def test_a_dry_run_takes_little_longer_than_to_import_torch():
    command = ["-m", "cca_ds", "train", "--recipe", "llamagen-3b", "--dry_run", "--set", "model.from_scratch=true"]
    done, seconds = run_measured(*command)
    assert "3,096,659,200 parameters" in done.stdout and "stage 3 *" in done.stdout  # zero3.json is the default
    assert done.returncode == 2 and "holds no table of codes" in done.stderr and done.stderr.count("\n") == 1
    assert min(seconds, run_measured(*command)[1]) < 2.5 * torch_imports()


@pytest.mark.parametrize("name", ["zero2", "zero2.json", str(SHIPPED / "zero2.json")])
def test_a_shipped_deepspeed_file_by_its_name_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(name) == json.loads((SHIPPED / "zero2.json").read_text())
    (tmp_path / "zero2.json").write_text("{}")
    assert read_ds_config("zero2.json") == {}  # one's own first


def test_a_deepspeed_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"elsewhere/zero2.json: no such file; the shipped ones are zero2, zero3, "):
        read_ds_config("elsewhere/zero2.json")


@pytest.mark.parametrize("command", ["config", "--help", "plan --nodes 1xh100:8", "train --dry_run", "nothing"])
@pytest.mark.parametrize("where", [">/dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_a_console_that_takes_nothing_is_no_traceback(command, where):
    line = f"{sys.executable} -m cca_ds {command} {where}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert where != ">/dev/full" or (done.returncode in (1, 2) and done.stderr.count("\n") == 1)
