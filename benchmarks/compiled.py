"""What `torch.compile` saves at inference, and what it costs to compile: plain and compiled passes in turns.

    python benchmarks/compiled.py --size nano --pixels 64 --dtype bfloat16

Prompts are padded to buckets, so the seconds of compilation are paid once a shape of targets; PyTorch keeps the code in
TORCHINDUCTOR_CACHE_DIR, and a second process pays a fraction (run it twice to see).
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

from unialignment.benchmarking.measure import Timing, interleave, ratio
from unialignment.benchmarking.models import arguments, build, tokens_of
from unialignment.conditioning import Condition, Denoiser
from unialignment.storage import write_json


@torch.no_grad()
def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    plain = build(args.size, "prefix", dtype)
    compiled = copy.deepcopy(plain)
    compiled.compile_for_inference(bucket=32)
    plain.fuse_projections()
    sizes, (side, _) = arguments(args.size), tokens_of(args.size, args.pixels)
    latents = torch.randn(args.batch, sizes["in_channels"], side, side, dtype=dtype)
    embeds = torch.randn(args.batch, 32, sizes["joint_attention_dim"], dtype=dtype)
    open_positions = torch.ones(args.batch, 32, dtype=torch.bool)

    def passes(model: Any) -> dict[str, Any]:
        def condition(length: int) -> Denoiser:
            text = Condition(embeds[:, :length], open_positions[:, :length], (latents,))
            return Denoiser(model, {"full": text}, torch.arange(args.batch), True)

        state = {"image": condition(20), "text": condition(20)}
        return {
            "prefill": lambda: condition(20),
            "image step": lambda: state["image"].velocity(("full",), latents, 0.5),
            "text step": lambda: state["text"].logits(("full",), embeds, open_positions),
        }

    began = time.perf_counter()
    fast = passes(compiled)
    for run in fast.values():
        run()
    spent = time.perf_counter() - began
    slow = passes(plain)
    rows = {}
    print(f"{args.size}, {args.dtype}, batch {args.batch}: compiled in {spent:.0f} s")
    for name in slow:
        seconds = interleave({"plain": slow[name], "compiled": fast[name]}, args.repeats)
        gain = ratio(seconds["plain"], seconds["compiled"])
        rows[name] = {"plain": vars(Timing.of(seconds["plain"])), "plain_over_compiled": vars(gain)}
        print(f"  {name:<12}{1e3 * Timing.of(seconds['plain']).median:8.1f} ms, plain / compiled {gain}")
    result = {**{k: v for k, v in vars(args).items() if k != "json"}, "compile_seconds": spent, "rows": rows}
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
