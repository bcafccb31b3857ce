"""The paper's findings on the digits: what is committed holds, and a part of it is found again here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "digits"
RESULTS = BENCHMARKS.parent / "results"


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", BENCHMARKS / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def committed() -> dict:
    return json.loads((RESULTS / "digits_paper.json").read_text())


def test_committed_claims_follow_from_the_committed_numbers(claims, committed):
    assert claims.check(committed["experiments"]) == committed["claims"]
    assert len(committed["claims"]) >= 12 and all(committed["claims"].values())
    assert committed["repeats"] == 3


def test_committed_table_is_that_of_the_numbers(claims, committed):
    assert (RESULTS / "digits_paper.md").read_text() == claims.markdown(committed)


def test_a_claim_that_fails_is_found(claims, committed):
    experiments = committed["experiments"]
    dpo = next(row for row in experiments["losses"] if row["name"] == "DPO")
    dpo["positives"]["mean"] = 0.0
    failed = [claim for claim, holds in claims.check(experiments).items() if not holds]
    assert len(failed) == 1 and failed[0].startswith("Table 3: DPO's positives lose likelihood (0.0 nats")


@pytest.mark.slow
def test_figure_1_and_tables_2_and_3_are_found_again(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "paper.py"), "--experiments", "guidance", "losses"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--work", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("yes  ") == 6
