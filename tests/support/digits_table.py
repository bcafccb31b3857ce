"""The table of scikit-learn's digits, written once per folder."""

from pathlib import Path

from cca_ds.data.codes import CodeTable
from cca_ds.vq.digits import builtin_codes


def digits_table(folder: Path) -> CodeTable:
    """All 1,797 digits with one crop of 64 codes each, written below `folder`."""
    return CodeTable.open(builtin_codes(folder))
