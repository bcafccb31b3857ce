"""The README's results are generated from the committed JSON."""

import json
from pathlib import Path

import pytest

from cca_ds.reporting.results_table import BEGIN, END, ResultsError, main, render, updated

REPOSITORY = Path(__file__).parents[2]
DEMO = {
    "commit": "abc1234", "date": "2026-01-02", "device": "2 cores",
    "table": {
        "columns": ["", "FID", "accuracy", "time"], "decimals": {"FID": 2},
        "rows": [["base", 1.2149, 0.71349, "1x"], ["s = 0.5 | guided", {"mean": 1.5, "spread": 0.05}, None, "2x"]],
    },
}  # fmt: skip


@pytest.fixture
def project(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "demo.json").write_text(json.dumps(DEMO))
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    return tmp_path


def arguments(project: Path, *more: str) -> list[str]:
    return ["--readme", str(project / "README.md"), "--results", str(project / "benchmarks" / "results"), *more]


def test_readme_of_this_repository_equals_its_committed_results():
    """The tables between the markers are those of benchmarks/results; without results there are none."""
    tables = render(REPOSITORY / "benchmarks" / "results")
    readme = REPOSITORY / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    if tables or BEGIN in text:
        assert updated(text, tables) == text, "run python -m cca_ds.reporting.results_table"


def test_table_by_hand(project):
    assert render(project / "benchmarks" / "results").splitlines() == [
        "What `make demo` prints (date 2026-01-02, commit abc1234, device 2 cores, `benchmarks/results/demo.json`):",
        "",
        "|  | FID | accuracy | time |",
        "| --- | --- | --- | --- |",
        "| base | 1.21 | 0.713 | 1x |",
        "| s = 0.5 \\| guided | 1.50 ± 0.05 | - | 2x |",
    ]


def test_command_writes_and_check_reports_differences(project, capsys):
    assert main(arguments(project, "--check")) == 1
    assert "old" in (project / "README.md").read_text()
    assert main(arguments(project)) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "| base | 1.21 |" in text
    assert main(arguments(project, "--check")) == 0
    assert main(arguments(project)) == 0
    assert (project / "README.md").read_text() == text
    (project / "README.md").write_text(text.replace("1.21", "1.11"))
    assert main(arguments(project, "--check")) == 1
    capsys.readouterr()


def test_rows_of_models_become_a_table(project):
    """As benchmarks/digits/demo.py writes them; sampling time is relative to the first row's."""
    rows = [{"name": "base", "s": 0.0, "seconds": 2.0, "fid": 1.21, "inception_score": 7.674, "accuracy": 0.7128},
            {"name": "CCA", "s": 0, "seconds": 2.1, "fid": 1.5, "inception_score": 8.4,
             "accuracy": {"mean": 0.85, "spread": 0.01}}]  # fmt: skip
    (project / "benchmarks" / "results" / "demo.json").write_text(json.dumps({"rows": rows, "claims": {}}))
    assert render(project / "benchmarks" / "results").splitlines()[2:] == [
        "| model | guidance s | FID | IS | class accuracy | sampling time |",
        "| --- | --- | --- | --- | --- | --- |",
        "| base | 0.00 | 1.210 | 7.67 | 0.713 | 1.00x |",
        "| CCA | 0.00 | 1.500 | 8.40 | 0.850 ± 0.010 | 1.05x |",
    ]


def test_second_source_follows_the_first(project):
    paper = {"table": {"columns": ["loss", "FID"], "rows": [["dpo", 3.75]]}}
    (project / "benchmarks" / "results" / "digits_paper.json").write_text(json.dumps(paper))
    (project / "benchmarks" / "results" / "other.json").write_text("{}")
    tables = render(project / "benchmarks" / "results")
    assert tables.index("make demo") < tables.index("| dpo | 3.75 |")


@pytest.mark.parametrize("readme", ["nothing", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_both_markers_are_required_once(readme):
    with pytest.raises(ResultsError, match="once each"):
        updated(readme, "table")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("{}", 'no "table"'), ('{"table": {"columns": ["a"], "rows": [[1, 2]]}}', "as many cells")],
)
def test_unusable_results_are_one_line(project, content, message, capsys):
    (project / "benchmarks" / "results" / "demo.json").write_text(content)
    assert main(arguments(project)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "old" in (project / "README.md").read_text()
