"""What a run says while it trains: console line, ``metrics.jsonl``, TensorBoard, and the summary at the end.

Knows nothing of models; it is handed numbers and pictures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from unialignment.errors import StorageError
from unialignment.training.schedule import Progress as RunProgress
from unialignment.training.trackers import open_tracker


class RunLog:
    """Appends metrics to ``metrics.jsonl`` and, if wanted and installed, to TensorBoard.

    Args:
        folder: Run folder, created if missing.
        tensorboard: Whether to write TensorBoard event files to ``folder/tensorboard``.
        resume_step: On resuming, lines of later steps (logged after the checkpoint) are dropped, so that every
            step occurs once.
        trackers: Names of further trackers, see :mod:`unialignment.training.trackers`.
        name: Of the run, for trackers.
        settings: The run's configuration, for trackers.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool = True,
        resume_step: int | None = None,
        trackers: Sequence[str] = (),
        name: str = "run",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / "metrics.jsonl"
            if resume_step is not None and self.path.exists():
                kept = [r for r in read_metrics(self.path) if r["step"] <= resume_step]
                self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
            elif self.path.exists():
                self.path.unlink()
        except OSError as error:
            raise StorageError(f"Cannot use the run folder {folder}: {error.strerror or error}.") from error
        self._trackers = [open_tracker(tracker, folder, name, settings or {}) for tracker in trackers]
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)  # type: ignore[no-untyped-call]

    def scalars(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Record numbers of one step. Non-finite ones are stored as ``null``.

        Raises:
            StorageError: the disk is full or the folder is gone.
        """
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            record[prefix + name] = float(f"{value:.7g}") if math.isfinite(value) else None
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(prefix + name, value, step)
            for tracker in self._trackers:
                tracker.scalars(step, {prefix + name: v for name, v in values.items() if math.isfinite(v)})
        except OSError as error:
            raise StorageError(f"Cannot write {self.path}: {error.strerror or error}.") from error

    def image(self, step: int, name: str, picture: NDArray[np.uint8]) -> Path:
        """Store a picture ``[H, W, 3]`` as ``samples/<name>-<step>.png``.

        Raises:
            StorageError: it could not be written.
        """
        path = self.folder / "samples" / f"{name}-{step:07d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(picture).save(path)
            if self._writer is not None:
                self._writer.add_image(name, picture, step, dataformats="HWC")
            for tracker in self._trackers:
                tracker.image(step, f"samples/{name}", path)
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error
        return path

    def text(self, step: int, name: str, content: str) -> None:
        """Append text (for instance generated captions) to ``samples/<name>.md`` and TensorBoard."""
        path = self.folder / "samples" / f"{name}.md"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n## Step {step}\n\n{content}\n")
            if self._writer is not None:
                self._writer.add_text(name, content, step)
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error

    def close(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Reporter:
    """Progress on the console: a bar on a terminal, a line now and then elsewhere.

    Args:
        console: Where to.
        name: Of the run.
        steps: Total, if known.
        seconds_between: Least time between two lines when there is no terminal.
    """

    def __init__(self, console: Console, name: str, steps: int | None, seconds_between: float = 10.0) -> None:
        self.console = console
        self._steps = steps
        self._between = seconds_between
        self._last = -math.inf
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f} %"))
            self._bar = Progress(*columns, TextColumn("{task.fields[facts]}"), console=console)
            self._task = self._bar.add_task(name, total=1.0, facts="")

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: RunProgress, means: dict[str, float], rate: float) -> None:
        """Show where the run is."""
        shown = {n.removeprefix("loss/"): v for n, v in means.items() if n.startswith("loss/")}
        losses = " ".join(f"{name} {value:.4f}" for name, value in shown.items())
        step = f"step {progress.step}" + (f"/{self._steps}" if self._steps else "")
        facts = f"{step}  {losses}  {rate:.0f} samples/s  left {duration(progress.remaining_seconds)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.fraction, facts=facts)
        elif time.monotonic() - self._last >= self._between:
            self.console.print(f"{100 * progress.fraction:5.1f} %  {facts}", highlight=False, soft_wrap=True)
            self._last = time.monotonic()

    def note(self, scores: dict[str, float]) -> None:
        """Show validation scores: the loss of each task and, for prompts, the gap at the highest noise."""
        tasks = "  ".join(f"{n.removeprefix('task/')} {v:.4f}" for n, v in scores.items() if n.startswith("task/"))
        gaps = "  ".join(f"{n.split('/')[1]} {v:.4f}" for n, v in scores.items() if n.endswith("0.99/gap"))
        text = f"held out: {tasks}" + (f"  | prompt gap: {gaps}" if gaps else "")
        self.console.print(text, highlight=False, soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def grid(rows: Sequence[Sequence[NDArray[np.uint8]]], gap: int = 2) -> NDArray[np.uint8]:
    """Pictures ``[H, W, 3]`` of equal size, laid out in rows with white gaps of ``gap`` pixels."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            y, x = gap + r * (height + gap), gap + c * (width + gap)
            canvas[y : y + height, x : x + width] = picture
    return canvas


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``"42 s"``, ``"3 min 05 s"``, ``"2 h 10 min"``."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
