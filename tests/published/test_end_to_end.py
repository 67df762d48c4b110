"""One tiny published folder: LoRA-trained for a few steps, merged, converted, and used again."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from unialignment.model.convert import convert, merge_folder
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.training.config import load_config
from unialignment.training.loop import Trainer


def test_trained_merged_converted_and_used(published_folder: Path, repo_root: Path, tmp_path: Path, pack) -> None:
    mixture = "{generate: 2, caption: 0, edit: 2, perceive: 0, control: 0, compose: 0, answer: 0, infill: 0}"
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", "run.max_steps=3", "data.workers=0", "logging.tensorboard=false"),
        *(f"model.initial={published_folder}", "model.transformer={}", "lora.rank=2", "optimizer.lr=0.01"),
        *(f"mixture={mixture}", "loss.cross=0", "loss.intrinsic=0", "world.varied=0", "logging.samples=false"),
        *("logging.validation_samples=2", "optimizer.warmup_steps=0", "text.max_length=256"),
    ]
    lora = Trainer(load_config(repo_root / "configs" / "tiny.yaml", overrides), Console(quiet=True)).train()
    assert not merge_folder(published_folder, lora, tmp_path / "merged").unmatched
    ours = convert(tmp_path / "merged", tmp_path / "ours")
    base, merged, converted = (
        UniAlignmentPipeline.from_pretrained(folder, device="cpu")
        for folder in (published_folder, tmp_path / "merged", ours)
    )
    state = [
        pipe.transformer.state_dict()["transformer_blocks.0.attn.to_q.weight"] for pipe in (base, merged, converted)
    ]
    assert not torch.equal(state[0], state[1]) and torch.equal(state[1], state[2])
    pictures = [
        pipe.generate("a red dog", seed=1, num_inference_steps=2, progress=False).images[0].tobytes()
        for pipe in (merged, converted)
    ]
    assert pictures[0] == pictures[1]
