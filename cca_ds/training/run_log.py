"""The log of a run: TensorBoard, JSON lines, a progress bar, the console; on rank 0 only.

A run's folder: config.yaml, metrics.jsonl, events.out.tfevents.* (TensorBoard's), samples/, logs/, checkpoints/,
summary.json, COMPLETED.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cca_ds.cluster.rank_logs import log_only
from cca_ds.console import say
from cca_ds.data.image_grid import encode_png
from cca_ds.files import naming, write_atomic
from cca_ds.untrusted import parse_json


def logged_lines(path: Path, last_step: int) -> list[str]:
    """Lines of metrics.jsonl up to step `last_step`; none where there is no file."""
    kept: list[str] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            beyond = parse_json(line, odd_numbers=True)["step"] > last_step
        except (ValueError, TypeError, KeyError):
            break  # a line torn by a kill; what follows it cannot be trusted
        if not beyond:
            kept.append(line)
    return kept


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop lines of steps after `last_step`, so that a resumed run logs no step twice."""
    if path.is_file():
        write_atomic(path, "".join(f"{line}\n" for line in logged_lines(path, last_step)))


def events_folder(folder: Path) -> Path:
    """Where a run's event files are: in its own folder, since TensorBoard names a run by the folder of its events.

    In tensorboard/ where that exists: older runs have theirs there, and one run would be shown as two.
    """
    older = folder / "tensorboard"
    return older if older.is_dir() else folder


def _log_errors_of_event_writers() -> None:
    """Print no traceback of TensorBoard's writing threads: what they met is raised where the next value is added."""
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        frames = traceback.extract_tb(args.exc_traceback)
        if any(Path(frame.filename).name == "event_file_writer.py" for frame in frames):
            log_only("".join(traceback.format_exception(args.exc_value)))
        else:
            previous(args)

    threading.excepthook = hook


class RunLog:
    """TensorBoard, JSON lines and the bar of one run, on rank 0; does nothing on others.

    Args:
        folder: the run's folder.
        on_rank_0: whether this is rank 0; on others nothing is written.
        steps, first_step: of the whole run, and where this process takes it up.
        still_ours: raises where another process writes to the folder; `look` asks the file system now.
    """

    def __init__(self, folder: Path, on_rank_0: bool, steps: int, first_step: int = 0, tensorboard: bool = True,
                 bar: bool = True, still_ours: Callable[..., None] = lambda look=True: None):  # fmt: skip
        self.on_rank_0, self.folder, self.first_step, self.still_ours = on_rank_0, folder, first_step, still_ours
        self.writer, self.lines, self.bar = None, None, None
        if not on_rank_0:
            return
        from tqdm import tqdm

        truncate_metrics(folder / "metrics.jsonl", first_step)
        self.lines = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            _log_errors_of_event_writers()
            # the purge takes back what an earlier process logged beyond the checkpoint that this one starts from
            self.writer = SummaryWriter(str(events_folder(folder)), purge_step=first_step + 1)
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            desc="train",
            unit="step",
            disable=not bar,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file keeps every line
        )

    def say(self, message: str) -> None:
        """One line on rank 0's console."""
        if self.on_rank_0:
            say(message)

    def step(self, step: int, values: dict[str, float], write: bool = True) -> None:
        """Values of step `step` (1 after the first), under the tags they are plotted by."""
        if not self.on_rank_0:
            return
        assert self.bar is not None and self.lines is not None
        self.still_ours(look=False)
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{values['throughput/images_per_second']:.1f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if not write:
            return
        with naming(self.lines.name):
            self.lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if self.writer:
            with naming(self.writer.log_dir):  # raises what TensorBoard's thread met with an earlier value
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)

    def image(self, tag: str, step: int, grid: Any, file_name: str) -> None:
        """A picture [H, W, C] uint8: into TensorBoard and as samples/`file_name`."""
        if not self.on_rank_0:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        write_atomic(self.folder / "samples" / file_name, encode_png(grid))
        if self.writer:
            self.writer.add_image(tag, grid, step, dataformats="HWC")

    def text(self, tag: str, content: str) -> None:
        """Preformatted text in TensorBoard, at the step where this process takes the run up."""
        if self.writer:
            lines = "\n".join(f"    {line}" for line in content.splitlines())
            self.writer.add_text(tag, lines, self.first_step)

    def hparams(self, settings: dict[str, bool | str | float]) -> None:
        """This run's row in TensorBoard's table of runs, from its first step on.

        No experiment is declared. It could choose the columns, but TensorBoard takes that of one run for all, and what
        differs between them is known to none. Without one, it takes the columns from all runs, those that differ
        first, and the last value of every scalar as results; the first five of each are shown, the others by a click.
        """
        # torch would write true and false as the numbers 1 and 0
        texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
        self._session(texts, part=1)

    def finished(self) -> None:
        """Mark the row as one of a run that went well to its end.

        Raises:
            OSError: metrics.jsonl was deleted or replaced, so that the lines since then are lost.
        """
        self._session({}, part=2)
        if self.lines is not None:
            path = Path(self.lines.name)
            if not path.is_file() or not os.path.samestat(path.stat(), os.fstat(self.lines.fileno())):
                raise OSError(
                    f"{path} was deleted or replaced while the run wrote to it, and lines of it are lost; start again "
                    "to finish the run without them"
                )

    def _session(self, settings: dict[str, str | float], part: int) -> None:
        if self.writer:
            from torch.utils.tensorboard.summary import hparams

            self.writer.file_writer.add_summary(hparams(settings, {})[part])  # [experiment, start, end]

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        for part in (self.bar, self.writer, self.lines):
            if part is not None:
                part.close()
