"""A run of SemGen-World in a folder: what the model made and how it was judged, item by item, restartable at any point.

``run.json`` holds the identity of the run. Each part has a folder of its own under ``parts``: ``outputs.jsonl`` and
``pictures`` (on disk batch by batch), ``judgements.jsonl`` (what the parser saw and the scores) and, when it is done,
``part.json``. Knows nothing of how outputs are made or judged.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation.contestants import ModelContestant
from unialignment.evaluation.judge import Judge, Output
from unialignment.evaluation.metrics import Estimate
from unialignment.evaluation.records import RecordLog, claim, read_identity, versions
from unialignment.evaluation.world import Part, Settings, draw_part, part_samples, run_part
from unialignment.images import load_image
from unialignment.metadata import save_image
from unialignment.model.folders import file_checksum
from unialignment.storage import atomic_file, write_json
from unialignment.world.stream import WorldStream

NAME = "SemGen-World"


class RecordedModel(ModelContestant):
    """A model whose outputs are on disk, batch by batch, before the next is asked for.

    Args:
        pipe: See :class:`ModelContestant`.
        batch_size: See there.
        settings: See there.
        home: Folder of the part.
        draw: Whether what is missing is made; otherwise it is an error.
    """

    def __init__(
        self, pipe: Any, batch_size: int, settings: dict[str, dict[str, Any]] | None, home: Path, draw: bool = True
    ) -> None:
        super().__init__(pipe, batch_size, settings)
        self.home, self.draw = home, draw
        self.log = RecordLog(home / "outputs.jsonl", ("turn", "item"))
        self.turns = 0
        self.latest: list[Output] = []
        """The outputs of the last turn."""
        self.earlier = 0.0
        """Seconds that went into outputs which were there already."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`~unialignment.evaluation.contestants.Contestant`."""
        turn, self.turns = self.turns, self.turns + 1
        found: dict[int, Output] = {}
        for rows in _batches(samples, self.batch_size):
            known = {row: self._known(turn, row) for row in rows}
            kept = {row: output for row, output in known.items() if output is not None}
            if len(kept) < len(rows):
                if not self.draw:
                    raise InputError(f"outputs are missing in {self.home}; run the generate step first")
                kept = self._make(turn, {row: samples[row] for row in rows}, seed)
            else:
                self.earlier += sum(self._record(turn, row)["seconds"] for row in rows)
            found |= kept
        self.shortened = sum("read" in record for record in self.log)
        self.latest = [found[row] for row in range(len(samples))]
        return list(self.latest)

    def _make(self, turn: int, samples: dict[int, Sample], seed: int) -> dict[int, Output]:
        started = time.perf_counter()
        made = self.produce(list(samples.values()), [seed + row for row in samples])
        seconds = (time.perf_counter() - started) / len(samples)
        for (row, sample), output in zip(samples.items(), made, strict=True):
            record: dict[str, Any] = {"turn": turn, "item": row, "kind": sample.kind, "prompt": sample.prompt}
            if (read := self.read(sample)) != sample.prompt:
                record["read"] = read
            record["seed"] = seed + row
            if isinstance(output, str):
                record["text"] = output
            else:
                path = save_image(Image.fromarray(output), self.home / "pictures" / f"{turn}-{row:04d}.png")
                record |= {"picture": str(path.relative_to(self.home)), "sha256": file_checksum(path)}
            self.log.append({**record, "seconds": round(seconds, 4)})
        return dict(zip(samples, made, strict=True))

    def _record(self, turn: int, row: int) -> dict[str, Any]:
        record = self.log.get(turn, row)
        assert record is not None
        return record

    def _known(self, turn: int, row: int) -> Output | None:
        record = self.log.get(turn, row)
        if record is None or "text" in record:
            return None if record is None else str(record["text"])
        path = self.home / record["picture"]
        if not path.is_file() or file_checksum(path) != record["sha256"]:
            return None
        return np.asarray(load_image(path))


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Rows that a pipeline computes together: those with as many sources, some at a time; texts all at once."""
    if samples and samples[0].target_image is None:
        yield list(range(len(samples)))
        return
    shapes: dict[int, list[int]] = {}
    for row, sample in enumerate(samples):
        shapes.setdefault(len(sample.sources), []).append(row)
    for rows in shapes.values():
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def begin(
    folder: Path, stream: WorldStream, model: dict[str, Any], settings: Settings, accept_versions: bool = False
) -> None:
    """Write the run's identity, or compare it with the one that is there.

    Raises:
        InputError: The folder holds another run.
    """
    world = {"preset": stream.preset.name, "split": stream.split, "fingerprint": stream.pack.digest}
    identity = {
        "benchmark": {"name": NAME, **world, "seed": settings.seed, "limit": settings.limit, "pool": settings.pool},
        "model": model,
        "settings": {
            "samplers": settings.samplers,
            "batch_size": settings.batch_size,
            "references": settings.references,
        },
        "versions": versions(),
    }
    claim(folder / "run.json", identity, accept_versions)


def run_recorded(
    pipe: Any,
    stream: WorldStream,
    judge: Judge,
    name: str,
    settings: Settings,
    *,
    folder: Path,
    steps: Sequence[str] = ("generate", "judge"),
) -> Part | None:
    """Evaluate one part as far as that is not done yet; without the step ``judge`` there is no :class:`Part`.

    Raises:
        InputError: Outputs are missing and may not be made.
        StorageError: Something can't be written.
    """
    home = folder / "parts" / name
    if (done := read_part(folder, name)) is not None:
        return done
    model = RecordedModel(pipe, settings.batch_size, settings.samplers, home, "generate" in steps)
    if "judge" not in steps:
        draw_part(stream, name, settings, model)
        return None
    part = run_part(pipe, stream, judge, name, settings, model)
    part = dataclasses.replace(part, seconds=part.seconds + model.earlier)
    if model.latest:
        _write_judgements(home, stream, judge, name, settings, model, part)
    write_json(home / "part.json", dataclasses.asdict(part))
    return part


def _write_judgements(
    home: Path, stream: WorldStream, judge: Judge, name: str, settings: Settings, model: RecordedModel, part: Part
) -> None:
    lines = []
    for row, sample in enumerate(part_samples(stream, name, settings.limit)):
        made = [model._record(turn, row) for turn in range(model.turns)]
        keep = ("picture", "sha256") if "picture" in made[-1] else ("text",)
        record = {"item": row, "kind": sample.kind, "prompt": sample.prompt, "seed": made[0]["seed"]}
        record |= {key: made[-1][key] for key in keep}
        output = model.latest[row]
        if not isinstance(output, str) and sample.task != "perceive":
            record["seen"] = _seen(judge, output)
        elif sample.target_text is not None:
            record["expected"] = sample.target_text
        record["scores"] = part.scores[row]
        record["seconds"] = round(sum(one["seconds"] for one in made), 4)
        lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_file(home / "judgements.jsonl") as file:
        file.write("".join(lines).encode())


def _seen(judge: Judge, output: np.ndarray) -> dict[str, Any]:
    """What the parser saw: the background, and every object with its score, those below its threshold included."""
    parsed = judge.parsed(output)
    pairs = zip(parsed.explanation.objects, parsed.explanation_scores, strict=True)
    objects = [{**dataclasses.asdict(item), "score": round(score, 4)} for item, score in pairs]
    return {"background": parsed.scene.background, "objects": objects}


def read_part(folder: Path, name: str) -> Part | None:
    """A finished part, or ``None``.

    Raises:
        InputError: Its file is damaged.
    """
    path = folder / "parts" / name / "part.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["metrics"] = _estimates(data["metrics"])
        data["by_kind"] = {key: _estimates(kinds) for key, kinds in data["by_kind"].items()}
        return Part(**{**data, "scores": tuple(data["scores"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and the part is judged anew") from error


def _estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    return {key: Estimate(**value) for key, value in found.items()}


def read_judgements(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """The judged items of a part by their number; empty where there are none."""
    path = folder / "parts" / name / "judgements.jsonl"
    if not path.is_file():
        return {}
    return {record["item"]: record for record in RecordLog(path, ("item",))}


def read_run(folder: Path) -> dict[str, Any]:
    """The identity of a run of SemGen-World.

    Raises:
        InputError: The folder holds none.
    """
    identity = read_identity(folder / "run.json")
    if identity.get("benchmark", {}).get("name") != NAME:
        raise InputError(f"{folder} holds no run of SemGen-World; write one with unialign eval semgen-world --out")
    return identity
