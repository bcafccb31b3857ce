"""The thread that writes checkpoints: order, bounded memory, errors that surface."""

import threading

import pytest

from cca_ds.checkpoints.background_writer import BackgroundWriter
from cca_ds.checkpoints.store import CheckpointError, begin, complete_checkpoints, publish


def test_background_writer_keeps_order_and_returns_at_once():
    writer, done, gate = BackgroundWriter(), [], threading.Event()
    writer.submit(lambda: (gate.wait(10), done.append("first")))
    writer.submit(done.append, "second")
    assert done == []
    gate.set()
    writer.wait()
    assert done == ["first", "second"]
    writer.close()
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(done.append, "third")


def test_background_writer_holds_a_bounded_number_of_copies():
    writer, gate, started = BackgroundWriter(waiting=1), threading.Event(), threading.Event()
    writer.submit(lambda: (started.set(), gate.wait(10)))
    assert started.wait(10)
    writer.submit(lambda: None)  # waits in the queue
    third = threading.Thread(target=writer.submit, args=(lambda: None,))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # a third copy of the state must not exist yet
    gate.set()
    third.join(10)
    assert not third.is_alive()
    writer.close()


def test_background_errors_surface_once_at_the_next_call(tmp_path):
    writer, partial = BackgroundWriter(), begin(tmp_path, 2)
    writer.submit(publish, partial, [partial / "absent.pt"])
    with pytest.raises(CheckpointError, match=r"absent\.pt"):
        writer.wait()
    writer.wait()
    partial = begin(tmp_path, 2)
    (partial / "rank_0.pt").write_bytes(b"x")
    writer.submit(publish, partial, [partial / "rank_0.pt"])
    writer.close()
    assert complete_checkpoints(tmp_path) == [tmp_path / "step_00000002"]
