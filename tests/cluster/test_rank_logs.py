"""Each rank's output is kept in the run's folder; rank 0 stays on the console; each rank reports its error."""

import pytest

from tests.dist.ranks import run_ranks

PROGRAM = """
import logging, os, sys
logger = logging.getLogger("library")
logger.addHandler(logging.StreamHandler(sys.stderr))
logging.getLogger("other").addHandler(logging._StderrHandler())  # reads sys.stderr at every record
from cca_ds.cluster.launch import find_ranks
from cca_ds.cluster.rank_logs import keep_rank_log
ranks = find_ranks(os.environ, 0)
path = keep_rank_log(sys.argv[1], ranks)
print("printed by", ranks.rank)
logger.error("logged by %d", ranks.rank)
sys.stderr.write("\\rbar 10%\\rbar 50%"); sys.stderr.write("\\rbar 100%\\n")
sys.stdout.flush()
os.system("echo from a child") if ranks.rank else None
if ranks.rank == 1:
    raise ValueError("no luck\\nwith details")
"""


@pytest.mark.dist
def test_logs_of_all_ranks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for _ in range(2):  # a continued run appends
        outputs = run_ranks(program, 2, arguments=[tmp_path], timeout=60, check=False)
    logs = [(tmp_path / "logs" / f"rank_{rank:05d}.log").read_text() for rank in range(2)]
    for rank, log in enumerate(logs):
        assert log.count(f"rank {rank} of 2 on ") >= 2
        assert log.count(f"printed by {rank}\n") == 2
        assert log.count(f"logged by {rank}\n") == 2
        assert log.count("bar 100%\n") == 2
    assert "bar 50%" not in logs[0]
    assert logs[1].count("from a child") == 2
    assert "with details" in logs[1]
    assert "printed by 0\n" in outputs[0].stdout
    assert "logged by 0\n" in outputs[0].stderr
    assert outputs[1].stdout == ""
    assert outputs[1].stderr.startswith("rank 1 on ")
    assert outputs[1].stderr.endswith(f": ValueError: no luck (see {tmp_path}/logs/rank_00001.log)\n")
