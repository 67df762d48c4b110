"""The plain-language summary at the end of a run, as Markdown. Knows nothing of models; it reads what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unialignment.training.config import TransformerConfig
from unialignment.training.logging import duration, read_metrics, table
from unialignment.training.schedule import Progress


def summarise(
    config: TransformerConfig,
    progress: Progress,
    metrics: Path,
    validations: list[dict[str, float]],
    skipped: int,
    replaced: Mapping[str, int],
) -> str:
    """What was trained, for how long, how it went, and how to use it.

    Args:
        config: The run's configuration.
        progress: Steps and seconds.
        metrics: The run's ``metrics.jsonl``.
        validations: Scores of each validation, with their ``step``.
        skipped: Steps skipped for a loss that was not finite.
        replaced: Samples replaced because a text did not fit or a row could not be used, by task.
    """
    per_micro = sum(config.mixture.values())
    seen = progress.step * config.micro_batches
    folder = config.run.folder
    lines = [
        f"# Run `{config.run.name}`",
        "",
        f"{progress.step} steps of {per_micro * config.micro_batches} samples in {duration(progress.elapsed)}: "
        f"{seen * per_micro} samples, {seen * per_micro / max(1.0, progress.elapsed):.0f} a second with validation.",
        "",
        f"Weights (moving average): `{folder / 'model'}`. Try them: "
        f'`unialign generate --model {folder / "model"} "a dog on a blue background"`.',
        "",
    ]
    records = [r for r in read_metrics(metrics) if "train/loss/total" in r]
    if len(records) >= 2:
        first, last = records[0], records[-1]
        names = [n for n in last if n.startswith("train/loss/") or n.startswith("train/task/")]
        rows = [
            [n.removeprefix("train/"), _number(first.get(n)), _number(last.get(n))]
            for n in sorted(names, key=lambda n: (n.startswith("train/task/"), n))
        ]
        lines += [
            f"## Training losses, steps {first['step']} and {last['step']}",
            "",
            table(["loss", "first", "last"], rows),
            "",
        ]
        waiting = [r["train/waiting_share"] for r in records if r.get("train/waiting_share") is not None]
        share = sum(waiting) / max(1, len(waiting))
        lines += [f"Waiting for data took {100 * share:.1f} % of the training time.", ""]
    if validations:
        first_scores, last_scores = validations[0], validations[-1]
        rows = [
            [name.split("/")[1], str(seen * config.mixture.get(name.split("/")[1], 0)), _number(first_scores.get(name)),
             _number(value)]
            for name, value in last_scores.items()
            if name.startswith("task/")
        ]  # fmt: skip
        lines += [
            "## Held-out denoising loss by task",
            "",
            table(["task", "samples seen", *(f"step {s['step']:.0f}" for s in (first_scores, last_scores))], rows),
            "",
        ]
        gaps = sorted({n.rpartition("/")[0] for n in last_scores if n.startswith("gap/")})
        if gaps:
            rows = []
            for stem in gaps:
                _, task, time = stem.split("/")
                right, empty = last_scores[f"{stem}/right"], last_scores[f"{stem}/empty"]
                followed = 100 * (empty - right) / empty if empty else 0.0
                rows.append([task, time, _number(right), _number(empty), f"{followed:.1f} %"])
            lines += [
                "## Prompt-following",
                "",
                "Denoising error near pure noise, with the right and with an empty prompt. The larger the reduction, "
                "the more the model draws what the prompt says; near zero it ignores the prompt.",
                "",
                table(["task", "t", "right prompt", "empty prompt", "reduction"], rows),
                "",
            ]
    troubles = []
    if skipped:
        troubles.append(f"{skipped} steps were skipped because the loss or gradient was not finite.")
    if replaced:
        listed = ", ".join(f"{count} {task}" for task, count in sorted(replaced.items()))
        troubles.append(
            f"Samples replaced because a text did not fit the tokens it may have, or a row could not be used: {listed}."
        )
    lines += ["## Irregularities", "", " ".join(troubles) or "None.", ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
