"""~ means the same in every flag of every command, and nobody's home is one line."""

import pytest

from cca_ds.__main__ import main

FLAGS = {
    "train --ds_config": ["train", "--ds_config", "{}"],
    "train --recipe": ["train", "--recipe", "{}"],
    "train --resume": ["train", "--resume", "{}"],
    "train data.codes": ["train", "--dry_run", "--set", "data.codes={}"],
    "plan --ds_config": ["plan", "--nodes", "1xh100:8", "--ds_config", "{}"],
    "encode --source": ["encode", "--source", "{}", "--output", "codes"],
    "encode --import_npy": ["encode", "--recipe", "llamagen-b", "--import_npy", "{}", "--output", "codes"],
    "export --run": ["export", "--run", "{}", "--output", "w.safetensors"],
    "sample --weights": ["sample", "--weights", "{}", "--output", "images"],
    "evaluate samples": ["evaluate", "{}", "--recipe", "digits"],
    "evaluate --report": ["evaluate", "--report", "{}"],
}


def said(capsys, flags: list[str], path: str) -> tuple[int, str]:
    try:
        code = main([flag.format(path) for flag in flags])
    except SystemExit as end:  # of argparse
        code = end.code
    printed = capsys.readouterr()
    return code, printed.err + printed.out


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_home_is_replaced(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, text = said(capsys, flags, "~/nothing")
    assert f"{tmp_path}/nothing" in text and "Traceback" not in text
    assert code == 2 and sorted(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_home_of_nobody(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, text = said(capsys, flags, "~nosuchuser/nothing")
    assert code == 2 and "there is no such user" in text and "Traceback" not in text
    assert sorted(tmp_path.iterdir()) == []
