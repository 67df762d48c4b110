"""Can this judge be believed? It is shown pictures with known faults beside right ones before its scores are used.

Right pictures are known for photographs without any model: the photograph itself for its own description, and for
editing a transformation whose result is exact (grey, upside down, negative). Faults: the untouched source as an edit,
another item's picture, noise, JPEG of quality 5. For each fault and each aspect that it spoils, the probability that
the judge scores the right picture higher than the spoilt one (AUC, ties count half) says how well it tells them
apart: 1 always, 0.5 by chance. Knows nothing of any particular judge.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unialignment.evaluation.benchmarks import Benchmark, Item
from unialignment.evaluation.harness import MAX_SIDE, ask, judge_folder, judge_identity, shown
from unialignment.evaluation.judges import Judge
from unialignment.evaluation.judges.prompts import PromptSet
from unialignment.evaluation.records import RecordLog, claim, digest
from unialignment.evaluation.scoring import ASPECTS, Aspect, Protocol
from unialignment.images import load_image

SPOILT: dict[tuple[str, str], tuple[Aspect, ...]] = {
    ("generate", "other"): ("consistency",),
    ("generate", "noise"): ("consistency", "quality"),
    ("generate", "jpeg"): ("quality",),
    ("edit", "untouched"): ("consistency",),
    ("edit", "other"): ("consistency",),
    ("edit", "noise"): ("consistency", "quality"),
    ("edit", "jpeg"): ("quality",),
}
"""Kind of item and fault to the aspects that it spoils."""
NEEDED = 0.75
"""Every fault has to be told apart at least this well."""
ANSWERED = 0.9
"""Share of questions that have to be answered with scores."""
EDITS = (
    ("Make the whole picture black and white, without any colour.", lambda p: ImageOps.grayscale(p).convert("RGB")),
    ("Turn the whole picture upside down.", ImageOps.flip),
    ("Turn the whole picture into its colour negative.", ImageOps.invert),
)


def cases(items: Sequence[Item], count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Pictures to show: dictionaries with ``item``, ``kind``, ``fault``, ``prompt``, ``source`` and ``picture``."""
    described = [item for item in items if item.kind == "generate" and item.photo is not None]
    sources = [item for item in items if item.photo is not None]
    photos = list({item.photo: item for item in described or sources}.values())[: count + 1]
    rng = np.random.default_rng(seed)
    # One photograph at a time: all pictures of fifty would take half a gigabyte.
    for index, item in enumerate(photos[:count]):
        photo, other = _load(item.photo), _load(photos[(index + 1) % len(photos)].photo)
        noise = Image.fromarray(rng.integers(0, 256, (photo.height, photo.width, 3), dtype=np.uint8))
        instruction, transform = EDITS[index % len(EDITS)]
        right = transform(photo)
        shared = {"item": item.id, "seed": seed}
        drawn = {"right": photo, "other": other, "noise": noise, "jpeg": _jpeg(photo)}
        for fault, picture in drawn.items() if described else ():  # sources come without a description
            yield {**shared, "kind": "generate", "fault": fault, "prompt": item.prompt, "picture": picture}
        edited = {"right": right, "untouched": photo, "other": other, "noise": noise, "jpeg": _jpeg(right)}
        for fault, picture in edited.items():
            entry = {**shared, "kind": "edit", "fault": fault, "prompt": instruction, "picture": picture}
            yield {**entry, "source": item.photo}


def calibrate(
    folder: Path,
    benchmark: Benchmark,
    judge: Judge,
    prompts: PromptSet,
    protocol: Protocol,
    count: int = 8,
    accept_versions: bool = False,
) -> dict[str, Any]:
    """Ask the judge about pictures with known faults, as far as it has not been asked yet, and return the verdict."""
    home = judge_folder(folder, judge.name)
    claim(home / "judge.json", judge_identity(judge, prompts, protocol), accept_versions)
    log = _log(home)
    for case in cases(benchmark.items, count):
        identity = digest(case["picture"].tobytes())
        for aspect in ASPECTS:
            if case["fault"] != "right" and aspect not in SPOILT[case["kind"], case["fault"]]:
                continue
            if log.get(case["item"], case["kind"], case["fault"], aspect) is not None:
                continue
            question = prompts.question(case["kind"], aspect, case["prompt"], protocol)
            source = case.get("source") if question.with_source else None
            answer = ask(judge, question, shown(source, case["picture"], protocol, case["kind"]), protocol.strict)
            kept = {name: case[name] for name in ("item", "kind", "fault", "seed")}
            log.append({**kept, "aspect": aspect, "prompt": question.text, "sha256": identity, **answer})
    return verdict(home)


def verdict(home: Path) -> dict[str, Any]:
    """How well the judge in that folder tells faults apart.

    Returns:
        ``trusted``, ``verdict`` (a sentence), ``answered`` (share), and ``faults``: for each the AUC and mean scores.
    """
    records = list(_log(home))
    if not records:
        return {"trusted": False, "verdict": "not calibrated: its scores are not known to mean anything", "faults": []}
    scores: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        values = scores.setdefault((record["kind"], record["fault"], record["aspect"]), [])
        if record["status"] == "ok":
            values.append(min(record["scores"]))
    faults: list[dict[str, Any]] = []
    kinds = {record["kind"] for record in records}
    for (kind, fault), aspects in SPOILT.items():
        if kind not in kinds:
            continue
        for aspect in aspects:
            right, wrong = scores.get((kind, "right", aspect), []), scores.get((kind, fault, aspect), [])
            means = {"right": _mean(right), "faulty": _mean(wrong), "n": len(wrong)}
            faults.append({"kind": kind, "fault": fault, "aspect": aspect, "auc": auc(right, wrong), **means})
    answered = sum(record["status"] == "ok" for record in records) / len(records)
    missed = [f"{f['kind']}/{f['fault']}/{f['aspect']}" for f in faults if f["auc"] is None or f["auc"] < NEEDED]
    if answered < ANSWERED:
        text = f"NOT to be believed: only {answered:.0%} of the calibration's questions were answered with scores"
    elif missed:
        text = f"NOT to be believed: does not tell right pictures from faulty ones ({', '.join(missed)})"
    else:
        text = f"tells right pictures from faulty ones (lowest AUC {min(f['auc'] for f in faults):.2f})"
    trusted = answered >= ANSWERED and not missed
    return {"trusted": trusted, "verdict": text, "answered": answered, "faults": faults}


def auc(right: Sequence[float], wrong: Sequence[float]) -> float | None:
    """Probability that a right picture scores higher than a faulty one; ties count half."""
    if not right or not wrong:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))


def _log(home: Path) -> RecordLog:
    return RecordLog(home / "calibration.jsonl", ("item", "kind", "fault", "aspect"))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _load(path: Path | None) -> Image.Image:
    assert path is not None
    picture = load_image(path)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def _jpeg(picture: Image.Image, quality: int = 5) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as again:
        return again.convert("RGB")
