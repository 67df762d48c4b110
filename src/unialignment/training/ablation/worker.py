"""One run of an ablation: train (or go on), measure, write its record.

A finished training is not repeated when only the measurements change, and a finished record not at all. Knows nothing
of other runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unialignment.errors import ConfigError, UniAlignmentError
from unialignment.evaluation.records import run_lock, versions
from unialignment.storage import write_json
from unialignment.training.ablation.config import AblationConfig, MeasureSection, Run, resolve
from unialignment.training.build import parameter_count
from unialignment.training.config import read_yaml, validate
from unialignment.training.logging import RunLog, read_metrics
from unialignment.training.loop import Trainer
from unialignment.training.world_samples import open_stream

RECORD = "record.json"
TRAINED = "trained.json"
STOPPED = 3
"""Exit code of a worker that was asked to stop; everything is saved."""


class CurveTrainer(Trainer):
    """A trainer that also follows retrieval, between held-out pairs, at every validation."""

    pool = 0
    _pairs: list[Any] | None = None

    def validate(self, log: RunLog | None = None) -> dict[str, float]:
        """See the base class; adds ``retrieval/r1``."""
        scores = super().validate(log)
        if self.pool and self.device.type == "cpu":
            from unialignment.pipeline import UniAlignmentPipeline
            from unialignment.training.ablation.leak import recall

            if self._pairs is None:
                self._pairs = held_out_pairs(self.config, self.pool, 0)
            objective = self.objective
            with self.ema.applied():
                pipe = UniAlignmentPipeline(
                    objective.transformer, objective.text_embedder, objective.autoencoder, self.tokenizer
                )
                images = pipe.embed_image([pair.target_image for pair in self._pairs])
                found = {"retrieval/r1": recall(images, pipe.embed_text([pair.prompt for pair in self._pairs]))}
            objective.train()
            objective.autoencoder.eval()
            scores |= found
            self.validations[-1] |= found
            if log is not None:
                log.scalars(self.progress.step, found, "validation/")
        return scores


def held_out_pairs(config: Any, count: int, seed: int, split: Any = "held_out") -> list[Any]:
    """Pictures and prompts that belong together, no prompt twice."""
    stream = open_stream(config, split, seed)
    chosen: dict[str, Any] = {}
    index = 0
    while len(chosen) < count and index < 50 * count:
        sample = stream.sample("generate", index)
        chosen.setdefault(sample.prompt, sample)
        index += 1
    return list(chosen.values())


def fingerprint(run: Run, measure: MeasureSection) -> dict[str, str]:
    """What a record came about from: digests of the training configuration and of what was measured.

    Defaults are left out, so that settings which a later version adds don't disown earlier records, and so are folders.
    """
    train = run.config.model_dump(mode="json", exclude_defaults=True)
    for section, names in (
        ("run", ("threads", "dir", "name", "fresh")),
        ("teacher", ("cache",)),
        ("text", ("tokenizer",)),
    ):
        train[section] = {key: value for key, value in train.get(section, {}).items() if key not in names}
    return {"train": _digest(train), "measure": _digest(measure.model_dump(mode="json", exclude_defaults=True))}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def finished(run: Run, measure: MeasureSection) -> dict[str, Any] | None:
    """The run's record, if it is complete and of these very settings."""
    record = _read(run.folder / RECORD)
    return record if record is not None and record.get("fingerprint") == fingerprint(run, measure) else None


def execute(config: AblationConfig, run: Run, console: Console | None = None) -> dict[str, Any] | None:
    """Train and measure one run, from wherever an earlier attempt was stopped.

    Returns:
        The record, or ``None`` if a signal asked to stop; the same call then goes on.

    Raises:
        ConfigError: the folder holds a run of other settings.
        StorageError: another process is at this very run.
        UniAlignmentError: training or measuring failed.
    """
    if (done := finished(run, config.measure)) is not None:
        return done
    with run_lock(run.folder):  # a run that outlived its driver may still be at it
        return _execute(config, run, console)


def _execute(config: AblationConfig, run: Run, console: Console | None) -> dict[str, Any] | None:
    marks = fingerprint(run, config.measure)
    began = _cpu_seconds()
    spent = _read(run.folder / "cost.json") or {"cpu_seconds": 0.0, "fingerprint": marks["train"]}
    if spent["fingerprint"] != marks["train"]:
        raise ConfigError(
            f"{run.folder} holds a run of other settings; remove that folder, or give the ablation another dir."
        )

    def cost() -> float:
        return round(float(spent["cpu_seconds"]) + _cpu_seconds() - began, 2)

    trained = _read(run.folder / TRAINED)
    if trained is None:
        write_json(run.folder / "cost.json", spent)
        trainer = CurveTrainer(run.config, console)
        trainer.pool = config.measure.pool
        trainer.train()
        write_json(run.folder / "cost.json", {"cpu_seconds": cost(), "fingerprint": marks["train"]})
        if not trainer.progress.done:
            return None
        trained = {
            "steps": trainer.progress.step,
            "seconds": round(trainer.progress.elapsed, 1),
            "cpu_seconds": cost(),
            "samples": trainer.progress.step * trainer.per_step,
            "parameters": parameter_count(trainer.trainable),
            "attention": str(trainer.objective.transformer.config.attention_mode),
        }
        write_json(run.folder / TRAINED, trained)
        del trainer
    started = time.perf_counter()
    metrics, intervals, leak = measure_run(config, run)
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "fingerprint": marks,
        "trained": trained,
        "measured_seconds": round(time.perf_counter() - started, 1),
        "metrics": metrics,
        "intervals": intervals,
        "leak": leak,
        "curves": curves(run.folder / "metrics.jsonl"),
        "versions": versions(),
    }
    write_json(run.folder / RECORD, record)
    return record


def measure_run(
    config: AblationConfig, run: Run
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, Any] | None]:
    """Metrics, their intervals over items, and the leak's readings on both splits, of a trained run."""
    import unialignment
    from unialignment.evaluation.judge import Judge
    from unialignment.evaluation.world import evaluate
    from unialignment.training.ablation.leak import measure_leak
    from unialignment.world.presets import preset
    from unialignment.world.sprites import SpritePack

    options = config.measure
    pipe = unialignment.load(run.folder / "model", device="cpu")
    pack = SpritePack.load(run.config.world.pack)
    drawing = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    given = {name: value for name, value in drawing.items() if value is not None}
    results = evaluate(
        pipe,
        open_stream(run.config, "held_out", options.seed),
        Judge(pack, preset(run.config.world.preset, pack)),
        limit=options.limit,
        seed=options.seed,
        tasks=(*options.tasks, "retrieval"),
        model=run.name,
        batch_size=options.batch_size,
        settings={task: dict(given) for task in ("generate", "edit", "perceive", "control", "compose")},
        references=False,
        pool=options.pool,
    )
    metrics = {key: item.value for key, item in results.metrics.items()}
    intervals = {key: [item.low, item.high] for key, item in results.metrics.items()}
    last = [line for line in read_metrics(run.folder / "metrics.jsonl") if "validation/task/generate" in line]
    for name, value in (last[-1] if last else {}).items():
        if name.startswith("validation/task/"):
            metrics[f"validation.{name.removeprefix('validation/task/')}"] = value
        elif name.startswith("validation/gap/") and name.endswith("/gap"):
            _, _, task, level, _ = name.split("/")
            metrics[f"gap.{task}.{level}"] = value
    leak = None
    if options.leak and run.config.loss.cross > 0:
        leak = {}
        for split in ("train", "held_out"):
            pairs = held_out_pairs(run.config, options.pool, options.seed, split)
            pictures, prompts = [one.target_image for one in pairs], [one.prompt for one in pairs]
            leak[split] = measure_leak(pipe, pictures, prompts, run.config.loss.cross_form, options.seed).to_json()
    clean = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
    return clean, {key: intervals[key] for key in intervals if key in clean}, leak


def curves(path: Path) -> dict[str, list[list[float]]]:
    """``[step, value]`` series of everything that was logged, by name; training losses thinned to 60 points."""
    series: dict[str, dict[int, float]] = {}
    for line in read_metrics(path):
        for name, value in line.items():
            if name.startswith(("validation/", "train/loss/", "train/cross/")) and value is not None:
                series.setdefault(name, {})[line["step"]] = value  # the last step may be validated twice
    kept = {}
    for name, by_step in series.items():
        points = [[step, value] for step, value in by_step.items()]
        stride = max(1, len(points) // 60) if name.startswith("train/") else 1
        kept[name] = points[::stride]
    return kept


def _cpu_seconds() -> float:
    """Processor seconds of this process and of children that ended: what a run costs, whoever shares the machine."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it, and the run goes on from its checkpoint."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is damaged; remove it, and the run goes on from its checkpoint.")
    return data


def main(arguments: list[str] | None = None) -> int:
    """``worker CONFIG.yaml ARM SEED``, the configuration being a resolved one.

    Returns:
        0 when finished, 2 for a mistake in what was given, :data:`STOPPED` when stopped by a signal.
    """
    parser = argparse.ArgumentParser(prog="unialignment.training.ablation.worker")
    parser.add_argument("config", type=Path)
    parser.add_argument("arm")
    parser.add_argument("seed", type=int)
    args = parser.parse_args(arguments)
    threads = int(os.environ.get("OMP_NUM_THREADS", "1") or 1)
    torch.set_num_threads(threads)
    try:
        config: AblationConfig = validate(AblationConfig, read_yaml(args.config), str(args.config))
        run = resolve(config, args.arm, args.seed)
        run = replace(run, config=run.config.model_copy(
            update={"run": run.config.run.model_copy(update={"threads": threads})}
        ))  # fmt: skip
        return 0 if execute(config, run) is not None else STOPPED
    except UniAlignmentError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
