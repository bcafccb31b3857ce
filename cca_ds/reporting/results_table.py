"""The README's results, generated from the committed JSON of the benchmarks.

python -m cca_ds.reporting.results_table            # rewrites README.md between the markers
python -m cca_ds.reporting.results_table --check    # exit code 1 when it differs

A result file `benchmarks/results/NAME.json` is shown when it is one of `SOURCES` and holds
{"commit": ..., "date": ..., "device": ..., "table": {"columns": [...], "rows": [[...], ...], "decimals": {column: n}}},
where a cell is a text, a number, null, or {"mean": m, "spread": s}; or {"rows": [{"name": ..., "s": ..., "fid": ...,
"inception_score": ..., "accuracy": ..., "seconds": ...}, ...]} of numbers or means, as `make demo` writes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cca_ds.files import write_atomic
from cca_ds.untrusted import read_json

SOURCES = {"demo": "What `make demo` prints", "digits_paper": "The paper's findings on the digits"}
COLUMNS = {"name": "model", "s": "guidance s", "fid": "FID", "inception_score": "IS", "accuracy": "class accuracy",
           "seconds": "sampling time"}  # fmt: skip
DECIMALS = {"s": 2, "fid": 3, "inception_score": 2, "accuracy": 3}
BEGIN = "<!-- results: written by python -m cca_ds.reporting.results_table -->"
END = "<!-- /results -->"


class ResultsError(ValueError):
    """A result file without a table, or a README without the markers."""


def render(results: Path) -> str:
    """Markdown of all result files in the folder; empty when there is none. ResultsError for a file without a table."""
    parts = []
    for name, title in SOURCES.items():
        path = results / f"{name}.json"
        if path.is_file():
            parts.append(_section(title, _read(path), path))
    return "\n\n".join(parts)


def updated(readme: str, tables: str) -> str:
    """The README's text with the tables between its markers. ResultsError unless each is there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ResultsError(f"README: needs the lines {BEGIN} and {END}, once each and in this order")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


def models_table(rows: list[dict[str, Any]]) -> str:
    """The table of the demo's rows in Markdown."""
    return "\n".join(_markdown(_table_of_models(rows)))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 when `--check` finds a difference, 2 for files that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    arguments = parser.parse_args(argv)
    try:
        old = arguments.readme.read_text()
        new = updated(old, render(arguments.results))
        if not arguments.check:
            write_atomic(arguments.readme, new)
    except (ValueError, OSError) as error:
        print(f"results_table: {error}", file=sys.stderr)
        return 2
    if arguments.check and new != old:
        print(f"{arguments.readme}: differs from {arguments.results}; run python -m cca_ds.reporting.results_table")
        return 1
    return 0


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, ResultsError)
    if isinstance(content, dict) and "table" not in content and isinstance(content.get("rows"), list):
        content["table"] = _table_of_models(content["rows"])
    table = content.get("table") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table.get("columns") or not table.get("rows"):
        raise ResultsError(f'{path}: holds no "table" of "columns" and "rows"')
    if any(len(row) != len(table["columns"]) for row in table["rows"]):
        raise ResultsError(f"{path}: a row has not as many cells as there are columns")
    return content


def _table_of_models(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The demo's rows as a table; sampling time as a multiple of the first row's."""
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    cells = []
    for row in rows:
        cells.append([row.get(key) for key in columns])
        if row.get("seconds") is not None and rows[0].get("seconds"):
            relative = row["seconds"] / rows[0]["seconds"]
            cells[-1][columns.index("seconds")] = f"{relative:.2f}x"
    decimals = {COLUMNS[key]: digits for key, digits in DECIMALS.items()}
    return {"columns": [COLUMNS[key] for key in columns], "rows": cells, "decimals": decimals}


def _section(title: str, content: dict[str, Any], path: Path) -> str:
    facts = [f"{key} {content[key]}" for key in ("date", "commit", "device") if content.get(key)]
    source = f"{title} ({', '.join([*facts, f'`{path.parent.parent.name}/{path.parent.name}/{path.name}`'])}):"
    return "\n".join([source, "", *_markdown(content["table"])])


def _markdown(table: dict[str, Any]) -> list[str]:
    decimals, columns = table.get("decimals", {}), [str(column) for column in table["columns"]]
    lines = [columns, ["---"] * len(columns)]
    for row in table["rows"]:
        lines.append([_cell(cell, decimals.get(column)) for column, cell in zip(columns, row, strict=True)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(value: Any, decimals: int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{_cell(value['mean'], decimals)} ± {_cell(value['spread'], decimals)}"
    if isinstance(value, float) or (isinstance(value, int) and decimals):
        return f"{value:.{decimals}f}" if decimals is not None else f"{value:.3g}"
    return " ".join(str(value).replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
