"""Peak memory of captioning and editing, beside the naive path, both measured in one run on a random model.

The naive path is as the published pipeline does it: float32, conditions encoded anew at every step, guidance in a
doubled batch, all samples at once, both heads computed and logits at every position. Ours: bfloat16, conditions encoded
once and cached (prefix mode), the target's head alone, logits where words are missing, micro-batches. Weights are
random.

    python benchmarks/memory.py --size 300M        the size that the issue asks for
    python benchmarks/memory.py --size 30M         a quick check

What is counted is every tensor alive at once, weights included; scratch memory inside an operator isn't.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from unialignment.memory import MemoryTracker, size_of, tensors_of
from unialignment.model.streaming import format_size
from unialignment.model.transformer import UniAlignmentTransformer

SIZES: dict[str, dict[str, int]] = {
    "3M": {"num_layers": 4, "num_attention_heads": 3},
    "30M": {"num_layers": 8, "num_attention_heads": 6},
    "300M": {"num_layers": 16, "num_attention_heads": 14},
}
VOCABULARY, WORDS, PROMPT, CHANNELS = 32128, 64, 32, 16


def build(size: str, mode: str, side: int) -> UniAlignmentTransformer:
    """A random model of ``side`` x ``side`` latents; the same weights in both modes."""
    torch.manual_seed(0)
    return UniAlignmentTransformer(
        **SIZES[size],
        attention_head_dim=64,
        sample_size=side,
        patch_size=2,
        in_channels=CHANNELS,
        joint_attention_dim=512,
        pos_embed_max_size=side,
        vocab_size=VOCABULARY,
        attention_mode=mode,
    ).eval()


def caption_naive(model: UniAlignmentTransformer, batch: int, side: int, steps: int) -> None:
    """Everything at once, whole canvas at every step."""
    picture, words = torch.randn(batch, CHANNELS, side, side), torch.randn(batch, WORDS, 512)
    time_ = torch.zeros(batch)
    for _ in range(steps):
        logits = model(text_embeds=words, latents=picture, timestep=time_, target="both").text_logits
        probabilities = logits.float().softmax(-1)
        words = words + probabilities.amax(-1, keepdim=True)


def caption_ours(model: UniAlignmentTransformer, batch: int, side: int, steps: int, at_once: int) -> None:
    """The picture once, in micro-batches; logits where words are still missing."""
    for start in range(0, batch, at_once):
        count = min(at_once, batch - start)
        picture = torch.randn(count, CHANNELS, side, side, dtype=model.dtype)
        words = torch.randn(count, WORDS, 512, dtype=model.dtype)
        cache = model.prefill(images=[picture])
        for step in range(steps):
            open_ = torch.arange(WORDS).expand(count, -1) >= WORDS * step // steps
            output = model.denoise(cache, text_embeds=words, timestep=torch.zeros(count), logit_positions=open_)
            best = output.text_logits.amax(-1)
            words[open_] = words[open_] + best[:, None]


def edit_naive(model: UniAlignmentTransformer, batch: int, side: int, steps: int) -> None:
    """Both guidance branches in one doubled batch, the source picture beside the target at every step."""
    x, source = (torch.randn(2 * batch, CHANNELS, side, side) for _ in range(2))
    prompt = torch.randn(2 * batch, PROMPT, 512)
    for step in range(steps):
        timestep = torch.full((2 * batch,), 1000.0 * (1 - step / steps))
        # The published model computes both heads at every step, whichever is wanted.
        velocity = model(text_embeds=prompt, latents=x, sources=[source], timestep=timestep, target="both").velocity
        right, empty = velocity.chunk(2)
        x = x - (empty + 3 * (right - empty)).repeat(2, 1, 1, 1) / steps


def edit_ours(model: UniAlignmentTransformer, batch: int, side: int, steps: int, at_once: int) -> None:
    """Conditions once, cached; the target alone at every step."""
    for start in range(0, batch, at_once):
        count = min(at_once, batch - start)
        x, source = (torch.randn(count, CHANNELS, side, side, dtype=model.dtype) for _ in range(2))
        prompt = torch.randn(2 * count, PROMPT, 512, dtype=model.dtype)
        cache = model.prefill(text_embeds=prompt, images=[source.repeat(2, 1, 1, 1)])
        for step in range(steps):
            timestep = torch.full((2 * count,), 1000.0 * (1 - step / steps))
            velocity = model.denoise(cache, latents=x.repeat(2, 1, 1, 1), timestep=timestep).velocity
            right, empty = velocity.chunk(2)
            x = x - (empty + 3 * (right - empty)) / steps


@torch.no_grad()
def measure(name: str, model: UniAlignmentTransformer, run: Any) -> dict[str, Any]:
    """Weights and peak of one path, in bytes, and its seconds."""
    weights = size_of(tensors_of(model))
    began = time.perf_counter()
    with MemoryTracker(tensors_of(model)) as tracker:
        run()
    return {
        "path": name,
        "weights": weights,
        "working": tracker.peak,
        "peak": weights + tracker.peak,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure both tasks on both paths; prints a table and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--side", type=int, default=64, help="latent positions a side (64: 512 px at f8)")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--at-once", type=int, default=1, help="pictures in a micro-batch, on our path")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps; memory doesn't depend on them")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    rows = []
    shared = (args.batch, args.side, args.steps)
    for task, naive, ours in (("caption", caption_naive, caption_ours), ("edit", edit_naive, edit_ours)):
        model = build(args.size, "joint", args.side)
        rows.append({"task": task, **measure("naive", model, lambda m=model, f=naive: f(m, *shared))})
        del model
        model = torch.nn.Module.to(build(args.size, "prefix", args.side), torch.bfloat16)
        rows.append({"task": task, **measure("ours", model, lambda m=model, f=ours: f(m, *shared, args.at_once))})
        del model
    print(f"{args.size} random model, {args.batch} pictures of {args.side} x {args.side} latents, {args.steps} steps")
    for row in rows:
        sizes = "".join(f"{part} {format_size(row[part]):>10}   " for part in ("weights", "working", "peak"))
        print(f"{row['task']:<9}{row['path']:<7}{sizes}{row['seconds']:>7} s")
    result = {"size": args.size, "batch": args.batch, "side": args.side, "steps": args.steps, "rows": rows}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
