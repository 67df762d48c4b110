"""Floating-point operations of a pass: counted while it runs, and by formula. Knows nothing of time.

Multiplications and additions of matrix products and attention are counted, two for each multiply-add, as
``torch.utils.flop_counter`` does; norms, activations and softmax are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # The registry hands shapes over; it knows the fused kernels of GPUs, but not the CPU's.
    return int(sdpa_flop_count(query, key, value))


def count_flops(run: Callable[[], Any]) -> int:
    """Operations that ``run`` takes, on the CPU's fused attention too, which PyTorch 2.13 itself doesn't count."""
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Sizes:
    """What the cost of a transformer follows from.

    Attributes:
        layers: Blocks.
        width: Token width.
        inner: Heads x channels a head.
        hidden: Feed-forward width.
        text: Width of incoming text embeddings.
        patch: Values of an incoming patch.
        patch_out: Values of a predicted patch.
        vocabulary: Text logits a position.
        shared: Whether modulation is one map for the model instead of one a block.
        aligned: Whether a single source is added to the target, place by place.
    """

    layers: int
    width: int
    inner: int
    hidden: int
    text: int
    patch: int
    patch_out: int
    vocabulary: int
    shared: bool
    aligned: bool

    @staticmethod
    def of(config: Any) -> Sizes:
        """Those of a transformer's configuration (without Stable Diffusion 3.5's second attention)."""
        width = config.num_attention_heads * config.attention_head_dim
        area = config.patch_size**2
        return Sizes(
            layers=config.num_layers,
            width=width,
            inner=width,
            hidden=int(width * config.mlp_ratio),
            text=config.joint_attention_dim,
            patch=config.in_channels * area,
            patch_out=(config.out_channels or config.in_channels) * area,
            vocabulary=config.vocab_size,
            shared=config.modulation == "shared",
            aligned=config.aligned_source,
        )

    def block(self, tokens: int, seen: int) -> int:
        """One block over ``tokens`` that attend to ``seen`` keys, modulation apart."""
        linear = 2 * tokens * self.width * (4 * self.inner + 2 * self.hidden)
        return linear + 4 * tokens * seen * self.inner

    def time(self, timesteps: int = 1) -> int:
        """What one stream takes from the time, for that many timesteps: embedding and every block's modulation."""
        embedding = 2 * timesteps * self.width * (256 + self.width)
        return embedding + 2 * timesteps * self.width * 6 * self.width * (1 if self.shared else self.layers)

    def prefill(self, prompt: int, images: tuple[int, ...] = ()) -> int:
        """Encoding a condition of ``prompt`` text tokens and pictures of so many tokens each."""
        tokens = prompt + sum(images)
        total = 2 * prompt * self.text * self.width + sum(2 * count * self.patch * self.width for count in images)
        total += self.time() * ((prompt > 0) + len(images))
        total += (self.layers - 1) * self.block(tokens, tokens)
        total += 2 * tokens * self.width * 3 * self.inner  # of the last block only queries, keys and values are made
        if self.aligned and len(images) == 1:
            total += 2 * images[0] * self.patch * self.width
        return total

    def image_step(self, tokens: int, conditions: int) -> int:
        """One pass over a target picture against cached conditions, the time's share apart."""
        embed = 2 * tokens * self.patch * self.width
        head = 2 * self.width * 2 * self.width + 2 * tokens * self.width * self.patch_out
        return embed + self.layers * self.block(tokens, conditions + tokens) + head

    def text_step(self, tokens: int, conditions: int, open_positions: int) -> int:
        """One pass over a target text against cached conditions, the time's share apart."""
        embed = 2 * tokens * self.text * self.width
        head = 2 * open_positions * self.width * self.vocabulary
        return embed + self.layers * self.block(tokens, conditions + tokens) + head
