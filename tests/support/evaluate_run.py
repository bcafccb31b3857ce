"""The evaluation's command line within a test."""

import pytest

from cca_ds import evaluate


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `evaluate`."""
    code = evaluate.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err
