"""Peak memory of captioning and editing, beside the naive path, all measured in one run on a random model.

The naive path is as the published pipeline does it: float32, conditions encoded anew at every step, guidance in a
doubled batch, both heads computed and logits at every position. Ours is what the pipeline runs, all pictures at once as
well: the target's head alone, logits where words are missing, and

* published weights (joint mode): one guidance branch after the other, in bfloat16 and in the naive path's float32;
* models trained here (prefix mode): conditions encoded once and kept, which takes memory for speed; in bfloat16 and
  float32, as under ``max_memory`` (no room in caches for targets), and that with one picture at a time.

Each is measured in a process of its own, in two ways:

* ``tensors``: every tensor alive at once, weights included; scratch memory inside an operator isn't seen;
* ``process``: the most that the process ever held, less what it held before the model was made.

    python benchmarks/memory.py --size 300M --json benchmarks/results/memory.json
    python benchmarks/memory.py --size 30M         a quick check
    python benchmarks/memory.py --paths naive "ours, published" "ours, published, float32"
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from unialignment.conditioning import Condition, Denoiser
from unialignment.memory import MemoryTracker, size_of, tensors_of
from unialignment.model.streaming import format_size
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.storage import write_json

SIZES: dict[str, dict[str, int]] = {
    "10M": {"num_layers": 4, "num_attention_heads": 3},
    "30M": {"num_layers": 5, "num_attention_heads": 5},
    "300M": {"num_layers": 13, "num_attention_heads": 12},
}
VOCABULARY, WORDS, PROMPT, CHANNELS, WIDTH = 32128, 64, 32, 16, 512
PATHS = {
    "naive": ("joint", torch.float32, True, False),
    "ours, published": ("joint", torch.bfloat16, True, False),
    "ours, published, float32": ("joint", torch.float32, True, False),
    "ours": ("prefix", torch.bfloat16, True, False),
    "ours, float32": ("prefix", torch.float32, True, False),
    "ours, max_memory": ("prefix", torch.bfloat16, False, False),
    "ours, one by one": ("prefix", torch.bfloat16, False, True),
}
"""Path → attention mode, type, whether caches keep room for targets, and whether pictures come one at a time."""


def build(size: str, mode: str, side: int, dtype: torch.dtype) -> UniAlignmentTransformer:
    """A random model of ``side`` x ``side`` latents, made in its own type, never in another."""
    with torch.device("meta"):
        model = UniAlignmentTransformer(
            **SIZES[size],
            attention_head_dim=64,
            sample_size=side,
            patch_size=2,
            in_channels=CHANNELS,
            joint_attention_dim=WIDTH,
            pos_embed_max_size=side,
            vocab_size=VOCABULARY,
            attention_mode=mode,
        )
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in tensors_of(model):
            tensor.normal_(std=0.02)
    return model.eval()


def caption_naive(model: UniAlignmentTransformer, batch: int, side: int, steps: int, room: bool) -> None:
    """Everything at once, whole canvas at every step."""
    picture, words = torch.randn(batch, CHANNELS, side, side), torch.randn(batch, WORDS, WIDTH)
    time_ = torch.zeros(batch)
    for _ in range(steps):
        logits = model(text_embeds=words, latents=picture, timestep=time_, target="both").text_logits
        probabilities = logits.float().softmax(-1)
        words = words + probabilities.amax(-1, keepdim=True)


def caption_ours(model: UniAlignmentTransformer, batch: int, side: int, steps: int, room: bool) -> None:
    """The pictures once; logits where words are still missing."""
    picture = torch.randn(batch, CHANNELS, side, side, dtype=model.dtype)
    words = torch.randn(batch, WORDS, WIDTH, dtype=model.dtype)
    nothing = Condition(words[:, :0], torch.ones(batch, 0, dtype=torch.bool), (picture,))
    denoiser = Denoiser(model, {"full": nothing}, torch.arange(batch), cached=True, room=room)
    for step in range(steps):
        open_ = torch.arange(WORDS).expand(batch, -1) >= WORDS * step // steps
        logits = denoiser.logits(("full",), words, open_)["full"]
        words[open_] = words[open_] + logits.softmax(-1).amax(-1)[:, None].to(words)


def edit_naive(model: UniAlignmentTransformer, batch: int, side: int, steps: int, room: bool) -> None:
    """Both guidance branches in one doubled batch, the source picture beside the target at every step."""
    x, source = (torch.randn(2 * batch, CHANNELS, side, side) for _ in range(2))
    prompt = torch.randn(2 * batch, PROMPT, WIDTH)
    for step in range(steps):
        timestep = torch.full((2 * batch,), 1000.0 * (1 - step / steps))
        # The published model computes both heads at every step, whichever is wanted.
        velocity = model(text_embeds=prompt, latents=x, sources=[source], timestep=timestep, target="both").velocity
        right, empty = velocity.chunk(2)
        x = x - (empty + 3 * (right - empty)).repeat(2, 1, 1, 1) / steps


def edit_ours(model: UniAlignmentTransformer, batch: int, side: int, steps: int, room: bool) -> None:
    """Conditions once; the target alone at every step."""
    x, source = (torch.randn(batch, CHANNELS, side, side, dtype=model.dtype) for _ in range(2))
    mask = torch.ones(batch, PROMPT, dtype=torch.bool)
    right, empty = (torch.randn(batch, PROMPT, WIDTH, dtype=model.dtype) for _ in range(2))
    conditions = {"full": Condition(right, mask, (source,)), "no_text": Condition(empty, mask, (source,))}
    denoiser = Denoiser(model, conditions, torch.arange(batch), cached=True, room=room)  # type: ignore[arg-type]
    sigmas = [1 - step / steps for step in range(steps)]
    denoiser.plan(sigmas)
    for sigma in sigmas:
        found = denoiser.velocity(("full", "no_text"), x, sigma)
        x = x - (found["no_text"] + 3 * (found["full"] - found["no_text"])).to(x) / steps


RUNS: dict[str, tuple[Any, Any]] = {"caption": (caption_naive, caption_ours), "edit": (edit_naive, edit_ours)}


def held() -> int:
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def measure(task: str, path: str, size: str, batch: int, side: int, steps: int) -> dict[str, Any]:
    """Memory of one path in bytes, and its seconds."""
    mode, dtype, room, one_by_one = PATHS[path]
    before = held()
    model = build(size, mode, side, dtype)
    run = RUNS[task][0 if path == "naive" else 1]
    weights = size_of(tensors_of(model))
    began = time.perf_counter()
    with MemoryTracker(tensors_of(model)) as tracker:
        for _ in range(batch if one_by_one else 1):
            run(model, 1 if one_by_one else batch, side, steps, room)
    return {
        **{
            "task": task,
            "path": path,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": weights,
            "working": tracker.peak,
        },
        **{"tensors": weights + tracker.peak, "process": held() - before},
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure both tasks on all paths; prints a table and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--side", type=int, default=64, help="latent positions a side (64: 512 px at f8)")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps; memory doesn't depend on them")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH", help="only these")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", nargs=2, metavar=("TASK", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    sizes = {"size": args.size, "batch": args.batch, "side": args.side, "steps": args.steps}
    if args.only:
        row = measure(*args.only, **sizes)
        print(json.dumps(row))
        return row
    print(f"{args.size} random model, {args.batch} pictures of {args.side} x {args.side} latents, {args.steps} step(s)")
    rows = []
    for task in RUNS:
        for path in args.paths:
            # A process of its own: what another path has freed may still be held.
            options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, __file__, *options, "--only", task, path]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            parts = "".join(f"{name} {format_size(row[name]):>10}  " for name in ("weights", "tensors", "process"))
            print(f"{row['task']:<9}{row['path']:<26}{parts}{row['seconds']:>7} s", flush=True)
    result = {**sizes, "rows": rows}
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
