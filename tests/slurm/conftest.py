"""One cluster, and one undisturbed run on it, for all tests of this folder."""

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import ONE_RANK, Run


@pytest.fixture(scope="session")
def cluster():
    if reason := missing():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def run(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    yield run
    cluster.run(["scancel", "--quiet", "--me"])


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory):
    """A run over two nodes that nothing happened to."""
    run = Run(cluster, tmp_path_factory.mktemp("undisturbed"))
    run.submit("--nodes=2", *ONE_RANK)
    assert run.end() == {"COMPLETED"}, run.output()
    return run
