"""One tiny published folder: used for all tasks, LoRA-trained for a few steps, merged, converted, and used again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import unialignment
from unialignment.cli import main
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.tasks import TASKS
from unialignment.training.config import load_config
from unialignment.training.loop import Trainer

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def every_task(pipe: UniAlignmentPipeline) -> dict[str, bytes | str]:
    """Each task's result once."""
    options = {"seed": 1, "num_inference_steps": 2, "progress": False}
    short = {**options, "max_length": 10}
    drawn = {
        "generate": pipe.generate("a red dog", **options),
        "edit": pipe.edit("replace the dog by a cat", PICTURE, **options),
        "perceive": pipe.perceive(PICTURE, kind="segment", of="the dog", **options),
        "control": pipe.control("a dog", PICTURE, kind="depth", **options),
        "compose": pipe.compose("a dog next to a cat", [PICTURE, PICTURE.rotate(90)], **options),
    }
    written = {
        "caption": pipe.caption(PICTURE, **short),
        "answer": pipe.answer(PICTURE, "what is next to the dog", **short),
        "infill": pipe.infill(PICTURE, "a ___ dog with ___ apple", **short),
        "rewrite": pipe.rewrite("a dog next to a cat", **short),
    }
    found = {**{k: v.images[0].tobytes() for k, v in drawn.items()}, **{k: v.texts[0] for k, v in written.items()}}
    assert set(found) == set(TASKS.names) and len(found) == 9
    return found


def test_used_trained_merged_converted_and_used_again(
    published_folder: Path, repo_root: Path, tmp_path: Path, pack: object
) -> None:
    base = unialignment.load(published_folder, device="cpu")
    first = every_task(base)
    base.save_pretrained(tmp_path / "saved")
    assert every_task(unialignment.load(tmp_path / "saved", device="cpu")) == first

    mixture = "{generate: 1, caption: 1, edit: 1, perceive: 1, control: 1, compose: 2, answer: 1, infill: 0}"
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", "run.max_steps=3", "data.workers=0", "logging.tensorboard=false"),
        *(f"model.initial={published_folder}", "model.transformer={}", "lora.rank=2", "optimizer.lr=0.05"),
        *(f"mixture={mixture}", "loss.cross=0", "loss.intrinsic=0", "world.varied=0", "logging.samples=false"),
        *("logging.validation_samples=2", "optimizer.warmup_steps=0", "text.max_length=256"),
    ]
    lora = Trainer(load_config(repo_root / "configs" / "tiny.yaml", overrides), Console(quiet=True)).train()
    report = base.load_lora(lora)
    assert report.matched and not report.unmatched
    adapted = every_task(base)
    assert all(adapted[task] != first[task] for task in ("generate", "edit", "perceive", "control", "compose"))
    base.unload_lora()
    assert every_task(base) == first

    merged, ours, back = tmp_path / "merged", tmp_path / "ours", tmp_path / "back"
    assert main(["merge", str(published_folder), str(lora), "--out", str(merged)]) == 0
    assert main(["convert", str(merged), "--out", str(ours)]) == 0
    assert main(["convert", str(ours), "--out", str(back)]) == 0
    pipes = [unialignment.load(folder, device="cpu") for folder in (merged, ours, back)]
    classes = [
        json.loads((folder / "model_index.json").read_text())["transformer"][1] for folder in (merged, ours, back)
    ]
    assert classes == ["SD3JointModelFlexible", "UniAlignmentTransformer", "SD3JointModelFlexible"]
    states = [pipe.transformer.state_dict() for pipe in pipes]
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])
    results = [every_task(pipe) for pipe in pipes]
    assert results[0] == results[1] == results[2]
    # Weights with the change in them do what the change beside them does, up to rounding.
    for task in ("generate", "edit", "perceive", "control", "compose"):
        one, other = (np.frombuffer(found[task], np.uint8).astype(int) for found in (results[0], adapted))
        assert np.abs(one - other).max() <= 3, task
    again = unialignment.load(ours, device="cpu", dtype="bfloat16", drop_text_encoder=True)
    assert again.generate("a red dog", seed=1, num_inference_steps=1, progress=False).images[0].size == (64, 64)
