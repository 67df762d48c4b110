"""Kernels that were chosen, or not, each beside what it replaces: same inputs, in turns, one thread.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json

* attention in bfloat16 as two products and a softmax, beside PyTorch's fused kernel;
* bfloat16 tokens by int8 weights (`torch._weight_int8pack_mm`), beside bfloat16 weights;
* query, key and value by one product over weights that lie side by side, beside three products;
* the autoencoder in channels-last memory, beside the usual layout.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import unialignment
from unialignment.benchmarking.measure import Machine, Timing, interleave, ratio
from unialignment.model import blocks
from unialignment.storage import write_json

Pair = tuple[Callable[[], Any], Callable[[], Any]]
"""What is replaced, and what replaces it."""


def attention(batch: int, heads: int, width: int, queries: int, keys: int) -> Pair:
    """bfloat16 attention: fused, and as :func:`unialignment.model.blocks.attend` does it up to a number of pairs."""
    q, k, v = (torch.randn(batch, heads, n, width).bfloat16() for n in (queries, keys, keys))

    def plain() -> Any:
        scores = torch.matmul(q * width**-0.5, k.transpose(-1, -2))
        return torch.matmul(scores.softmax(-1), v)

    return (lambda: F.scaled_dot_product_attention(q, k, v)), plain


def int8(tokens: int, width: int) -> Pair:
    """A layer of ``width`` to four times as much."""
    x, weight = torch.randn(tokens, width).bfloat16(), torch.randn(4 * width, width).bfloat16()
    scales = (weight.float().abs().amax(1) / 127).bfloat16()
    packed = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return (lambda: F.linear(x, weight)), (lambda: torch._weight_int8pack_mm(x, packed, scales))


def projections(tokens: int, width: int, dtype: torch.dtype) -> Pair:
    """Query, key and value of ``tokens``."""
    x = torch.randn(1, tokens, width).to(dtype)
    linears = tuple(torch.nn.Linear(width, width).to(dtype) for _ in range(3))
    together = blocks.fuse_linears(linears)
    heads = width // 64

    def three() -> Any:
        return [linear(x).unflatten(-1, (heads, -1)).transpose(1, 2) for linear in linears]

    return three, (lambda: blocks.project_heads(x, linears, heads, together))


def autoencoder(model: str, batch: int, decode: bool) -> Pair:
    """The bundled model's, in both memory layouts."""
    usual = unialignment.load(model, device="cpu").autoencoder
    last = copy.deepcopy(usual).to(memory_format=torch.channels_last)
    pictures = torch.rand(batch, 3, 64, 64) * 2 - 1
    latents = usual.encode(pictures)
    if decode:
        moved = latents.contiguous(memory_format=torch.channels_last)
        return (lambda: usual.decode(latents)), (lambda: last.decode(moved))
    moved = pictures.contiguous(memory_format=torch.channels_last)
    return (lambda: usual.encode(pictures)), (lambda: last.encode(moved))


def cases(model: str) -> dict[str, Callable[[], Pair]]:
    """Name → what makes its pair."""
    found: dict[str, Callable[[], Pair]] = {}
    # `nano` drawing eight pictures, guided, and writing eight captions; the 100M model's steps: generate, edit-1,
    # edit-4, caption; and at 512 px.
    for shape in (
        *((16, 6, 32, 64, 84), (8, 6, 32, 40, 105)),
        *(
            (2, 8, 64, 256, 288),
            (2, 8, 64, 256, 544),
            (2, 8, 64, 256, 1312),
            (1, 8, 64, 32, 288),
            (2, 8, 64, 1024, 2048),
        ),
    ):
        batch, heads, width, queries, keys = shape
        name = f"bfloat16 attention {batch} x {heads} x {queries} x {keys} of {width}: fused / plain"
        found[name] = lambda shape=shape: attention(*shape)  # type: ignore[misc]
    for tokens, width in ((8, 512), (256, 512), (8, 1536), (256, 1536)):
        found[f"int8 weights, {tokens} tokens of {width}: bfloat16 / int8"] = lambda t=tokens, w=width: int8(t, w)  # type: ignore[misc]
    for tokens in (8, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"projections, {tokens} tokens of 512, {str(dtype)[6:]}: three / one"
            found[name] = lambda t=tokens, d=dtype: projections(t, 512, d)  # type: ignore[misc]
    for decode in (False, True):
        name = f"autoencoder {'decoding' if decode else 'encoding'} 8 pictures: usual / channels-last"
        found[name] = lambda d=decode: autoencoder(model, 8, d)  # type: ignore[misc]
    return found


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="whose autoencoder")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    for name, make in cases(args.model).items():
        if args.only not in name:
            continue
        before, after = make()
        for new, old in zip(_tensors(after()), _tensors(before()), strict=True):
            assert (new - old).norm() < 0.05 * old.norm(), f"{name}: the two compute different things"
        seconds = interleave({"before": before, "after": after}, args.repeats, warm_up=3)
        gain = ratio(seconds["before"], seconds["after"])
        rows[name] = {"seconds_before": vars(Timing.of(seconds["before"])), "before_over_after": vars(gain)}
        print(f"{name:<68}{gain}", flush=True)
    if not rows:
        parser.error(f"no case is called {args.only!r}")
    result = {"machine": Machine.measured(3).to_json(), "repeats": args.repeats, "rows": rows}
    if args.json:
        write_json(args.json, result)
    return result


def _tensors(result: Any) -> list[torch.Tensor]:
    return [each.float() for each in (result if isinstance(result, (list, tuple)) else [result])]


if __name__ == "__main__":
    main()
