"""The dual-stream transformer block: separate weights for the image and the text stream, one attention over both.

Parameter names are Stable Diffusion 3's (arXiv 2403.03206, diffusers' ``JointTransformerBlock``), so that its weights
and those of the published UniAlignment checkpoint load unchanged. Knows nothing of timesteps, patches, tasks or caches:
it transforms *segments* (tokens of one stream with their modulation) and says what their keys and values are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stream = Literal["image", "text"]


class Modulation(nn.Module):
    """Adaptive-norm parameters from the time embedding (adaLN-Zero, arXiv 2212.09748).

    Args:
        dim: Width.
        chunks: How many ``[dim]`` vectors to produce.
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, chunks * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedding: Tensor) -> Tensor:
        """``[B, D]`` time embedding to ``[B, chunks * D]``."""
        return self.linear(F.silu(embedding))


@dataclass
class Segment:
    """Tokens of one stream that share a time embedding.

    Attributes:
        stream: Which weights transform them.
        tokens: ``[B, N, D]``.
        embedding: ``[B, D]`` (or ``[1, D]``: the same for all) time embedding, for block-wise modulation.
        shared: ``[B, 6 * D]`` model-wide modulation, when the model has one; else ``None``.
        ready: ``[B, 6 * D]`` (or ``[1, 6 * D]``) the next block's modulation, when it was computed ahead.
    """

    stream: Stream
    tokens: Tensor
    embedding: Tensor
    shared: Tensor | None = None
    ready: Tensor | None = None


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; x ``[B, N, D]``, shift and scale ``[B, 1, D]``."""
    return torch.addcmul(x + shift, x, scale)


PLAIN_ATTENTION = 1 << 19
"""Query-key pairs up to which bfloat16 attention on a CPU is two matrix products and a softmax."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, ``[B, heads, N, head_dim]``; ``mask`` bool, broadcastable to ``[B, heads, Nq, Nk]``.

    PyTorch's fused kernel, except in bfloat16 on a CPU over short sequences: there its backward pass is 4 to 8 times
    slower than two matrix products and a softmax (2.13, measured at 16 to 64 tokens), and its forward pass up to 1.8
    times (benchmarks/kernels.py); from about 256 x 288 tokens on both forward passes take the same time.
    """
    if (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] * key.shape[2] <= PLAIN_ATTENTION
    ):
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.softmax(-1), value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class FeedForward(nn.Module):
    """Linear, activation, linear; named as diffusers names them (``net.0.proj``, ``net.2``).

    Args:
        dim: Width.
        hidden: Width between the two.
        activation: ``"gelu"``: tanh-GELU (SD 3); ``"relu2"``: squared ReLU (arXiv 2109.08668), much cheaper on CPUs.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        first = nn.Module()
        first.proj = nn.Linear(dim, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = self.net[0].proj(x)  # type: ignore[operator, union-attr]
        if self.activation == "gelu":
            hidden = F.gelu(hidden, approximate="tanh")
        elif torch.is_grad_enabled():
            hidden = F.relu(hidden).square()
        else:
            # In place: these are the largest tensors of a pass, and on a CPU new ones are new pages each time.
            hidden = hidden.relu_().mul_(hidden)
        return self.net[2](hidden)


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    # The weight in the type of its input: autocast leaves it in float32, for which PyTorch has no fused kernel, and
    # attention wants queries, keys and values of one type.
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


Fused = tuple[Tensor, Tensor, tuple[int, ...]]
"""Weight ``[n * inner, D]`` and bias ``[n * inner]`` of n linear layers, of which each layer's own are views, and the
addresses of these views."""


def _addresses(linears: tuple[nn.Linear, ...]) -> tuple[int, ...]:
    # Looked up in every block of every pass: past nn.Module's attributes, which cost more than the rest together.
    held = [linear._parameters for linear in linears]
    return tuple(own["weight"].data_ptr() for own in held) + tuple(own["bias"].data_ptr() for own in held)  # type: ignore[union-attr]


def fuse_linears(linears: tuple[nn.Linear, ...]) -> Fused | None:
    """Lays the weights of several layers side by side in memory, so that one product can take them without a copy.

    The layers keep their parameters, names and values; no memory is added. ``None`` if they aren't plain layers whose
    weights are at hand: adapted (LoRA), quantized, offloaded.
    """
    for linear in linears:
        if type(linear) is not nn.Linear or linear.bias is None or linear.weight.is_meta or hasattr(linear, "_hf_hook"):
            return None
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = torch.cat([linear.bias.data for linear in linears])
    start = 0
    for linear in linears:
        stop = start + linear.weight.shape[0]
        linear.weight.data, linear.bias.data = weight[start:stop], bias[start:stop]
        start = stop
    return weight, bias, _addresses(linears)


def still_fused(fused: Fused, linears: tuple[nn.Linear, ...]) -> bool:
    """Whether the layers' parameters still are those views: whatever replaced one (a move, a merge) ended it."""
    return all(type(linear) is nn.Linear for linear in linears) and _addresses(linears) == fused[2]


def project_heads(x: Tensor, linears: tuple[nn.Linear, ...], heads: int, fused: Fused | None = None) -> list[Tensor]:
    """``[B, N, D]`` through several linear layers, each result as ``[B, heads, N, head_dim]``.

    One matrix product with their concatenated weights, which are small beside the tokens; the layers stay separate, as
    their names in published files are. ``fused`` saves the concatenation where no gradient is needed.
    """
    if any(type(linear) is not nn.Linear for linear in linears):  # adapted (LoRA) or quantized: not just a weight
        return [linear(x).unflatten(-1, (heads, -1)).transpose(1, 2) for linear in linears]
    # While compiling, addresses aren't known; `fuse_projections` has looked before.
    usable = fused is not None and not torch.is_grad_enabled()
    if usable and (torch.compiler.is_compiling() or still_fused(fused, linears)):  # type: ignore[arg-type]
        weight, bias, _ = fused  # type: ignore[misc]
    else:
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
    joined = F.linear(x, weight, bias).unflatten(-1, (len(linears), heads, -1))
    return [piece.transpose(1, 2) for piece in joined.unbind(2)]


def forget_fused(module: nn.Module) -> None:
    """Let go of what was fused anywhere in a module: a second hold on memory that is to be freed."""
    for part in module.modules():
        if isinstance(part, JointAttention):
            part._fused = {}


class JointAttention(nn.Module):
    """Query, key, value and output projections of both streams.

    Args:
        dim: Width of both streams.
        heads: Attention heads.
        head_dim: Channels a head.
        qk_norm: ``"rms_norm"`` (SD 3.5) or ``None`` (SD 3).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.to_add_out = nn.Linear(inner, dim)

        def norm() -> nn.RMSNorm | None:
            return nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None

        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()
        self._fused: dict[Stream, Fused | None] = {}

    def _linears(self, stream: Stream) -> tuple[nn.Linear, ...]:
        if stream == "image":
            return self.to_q, self.to_k, self.to_v
        return self.add_q_proj, self.add_k_proj, self.add_v_proj

    def fuse(self) -> None:
        """Lays query, key and value weights of each stream side by side, see :func:`fuse_linears`."""
        for stream in ("image", "text"):
            linears, fused = self._linears(stream), self._fused.get(stream)
            if fused is None or not still_fused(fused, linears):
                self._fused[stream] = fuse_linears(linears)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A move or cast makes new parameters; what was fused would only hold on to the old memory.
        self._fused = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's layers have memory of their own; what was fused would be copied beside it for nothing.
        return {**super().__getstate__(), "_fused": {}}

    def project(self, stream: Stream, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, N, D]`` to query, key and value, each ``[B, heads, N, head_dim]``."""
        if stream == "image":
            query_norm, key_norm = self.norm_q, self.norm_k
        else:
            query_norm, key_norm = self.norm_added_q, self.norm_added_k
        query, key, value = project_heads(x, self._linears(stream), self.heads, self._fused.get(stream))
        if query_norm is not None and key_norm is not None:
            query, key = _rms_norm(query, query_norm), _rms_norm(key, key_norm)
        return query, key, value

    def output(self, stream: Stream, x: Tensor) -> Tensor:
        """Attention result ``[B, heads, N, head_dim]`` to ``[B, N, D]``."""
        x = x.transpose(1, 2).flatten(2)
        return self.to_out[0](x) if stream == "image" else self.to_add_out(x)


class ImageAttention(nn.Module):
    """Projections of Stable Diffusion 3.5's second attention, in which image tokens see image tokens only.

    Args:
        dim: Width.
        heads: Attention heads.
        head_dim: Channels a head.
        qk_norm: See :class:`JointAttention`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        query, key, value = project_heads(x, (self.to_q, self.to_k, self.to_v), self.heads)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = _rms_norm(query, self.norm_q), _rms_norm(key, self.norm_k)
        return self.to_out[0](attend(query, key, value, None).transpose(1, 2).flatten(2))


class JointBlock(nn.Module):
    """One dual-stream block.

    Args:
        dim: Width.
        heads: Attention heads.
        head_dim: Channels a head.
        mlp_ratio: Hidden width of the feed-forward as a multiple of ``dim``.
        qk_norm: See :class:`JointAttention`.
        modulation: ``"block"``: each block has its own linear map from the time embedding (SD 3, the published
            checkpoint). ``"shared"``: one map for the model plus a learned offset a block (adaLN-single,
            arXiv 2310.00426), which saves half of a small model's parameters.
        activation: See :class:`FeedForward`.
        dual_attention: Whether image tokens also attend to the image tokens of the same pass alone (SD 3.5), with three
            more modulation vectors for it; needs ``modulation="block"``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        mlp_ratio: float,
        qk_norm: str | None,
        modulation: str,
        activation: str = "gelu",
        dual_attention: bool = False,
    ) -> None:
        super().__init__()
        if modulation == "block":
            self.norm1, self.norm1_context = Modulation(dim, 9 if dual_attention else 6), Modulation(dim, 6)
        else:
            self.scale_shift_table = nn.Parameter(torch.zeros(6 * dim))
            self.scale_shift_table_context = nn.Parameter(torch.zeros(6 * dim))
        self.attn = JointAttention(dim, heads, head_dim, qk_norm)
        self.attn2 = ImageAttention(dim, heads, head_dim, qk_norm) if dual_attention else None
        self.ff = FeedForward(dim, int(dim * mlp_ratio), activation)
        self.ff_context = FeedForward(dim, int(dim * mlp_ratio), activation)
        self.dim = dim

    def modulation(self, stream: Stream, embedding: Tensor, shared: Tensor | None) -> Tensor:
        """This block's modulation ``[B, 6 * D]`` (9 with a second attention) of a stream; see :class:`Segment`."""
        image = stream == "image"
        if shared is not None:
            return shared + (self.scale_shift_table if image else self.scale_shift_table_context)
        return (self.norm1 if image else self.norm1_context)(embedding)

    def _modulation(self, segment: Segment) -> list[Tensor]:
        values = segment.ready
        if values is None:
            values = self.modulation(segment.stream, segment.embedding, segment.shared)
        dual = segment.stream == "image" and self.attn2 is not None
        return list(values.unsqueeze(1).chunk(9 if dual else 6, dim=-1))

    def _norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Layer norm, then modulation; in the type that the next matrix product wants."""
        if scale.shape[0] == 1:
            # The same for the whole batch (conditions, at time zero): the norm's own weight and bias, in one kernel.
            # Sharded weights may travel in a smaller type than the tokens have.
            x = F.layer_norm(x, (self.dim,), (1 + scale.flatten()).to(x), shift.flatten().to(x), eps=1e-6)
        else:
            x = modulate(F.layer_norm(x, (self.dim,), eps=1e-6), shift, scale)
        device = x.device.type
        # Once here rather than by autocast before every product.
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def attention_inputs(self, segment: Segment) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        """Query, key, value (each ``[B, heads, N, head_dim]``) of a segment, and its modulation vectors."""
        modulation = self._modulation(segment)
        x = self._norm(segment.tokens, modulation[0], modulation[1])
        return self.attn.project(segment.stream, x), modulation

    def image_attention(self, segments: list[Segment], modulations: list[list[Tensor]]) -> list[Tensor | None]:
        """The second attention's result ``[B, N, D]`` for each image segment; ``None`` for text, and without one.

        All image tokens of a pass see each other. Cached conditions aren't seen: those saw each other at the prefill.
        """
        pictures = [index for index, segment in enumerate(segments) if segment.stream == "image"]
        found: list[Tensor | None] = [None] * len(segments)
        if self.attn2 is None or not pictures:
            return found
        tokens = [self._norm(segments[i].tokens, modulations[i][6], modulations[i][7]) for i in pictures]
        lengths = [segments[index].tokens.shape[1] for index in pictures]
        for index, piece in zip(pictures, self.attn2(torch.cat(tokens, dim=1)).split(lengths, dim=1), strict=True):
            found[index] = piece
        return found

    def finish(
        self, segment: Segment, attended: Tensor, modulation: list[Tensor], second: Tensor | None = None
    ) -> Segment:
        """Adds the attention results (``[B, heads, N, head_dim]``; ``second`` is the image attention's) and the MLP."""
        _, _, gate_attention, shift, scale, gate_mlp = modulation[:6]
        x = torch.addcmul(segment.tokens, self.attn.output(segment.stream, attended), gate_attention)
        if second is not None:
            x = torch.addcmul(x, second, modulation[8])
        feed_forward = self.ff if segment.stream == "image" else self.ff_context
        x = torch.addcmul(x, feed_forward(self._norm(x, shift, scale)), gate_mlp)
        return Segment(segment.stream, x, segment.embedding, segment.shared)

    def forward(
        self,
        segments: list[Segment],
        *,
        cached: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        finish: bool = True,
        room: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[list[Segment], tuple[Tensor, Tensor]]:
        """Attends all segments to each other and to cached keys and values, then transforms them.

        Args:
            segments: Tokens that see each other.
            cached: Keys and values ``[B, heads, Nc, head_dim]`` of clean conditions, seen but not transformed.
            mask: Bool ``[B, 1, 1, Nc + N]``, ``True`` where a key may be seen (cached ones first).
            finish: ``False`` when only the keys and values are wanted (the last block of a prefill).
            room: Buffers ``[B, heads, Nc + N or more, head_dim]`` that begin with ``cached``: the segments' own keys
                and values are written behind it, which saves copying the conditions' (not where gradients are needed).

        Returns:
            The transformed segments and the keys and values of *these* segments, in order.
        """
        inputs = [self.attention_inputs(segment) for segment in segments]
        query, key, value = inputs[0][0]
        if len(inputs) > 1:
            query, key, value = (torch.cat([qkv[i] for qkv, _ in inputs], dim=2) for i in range(3))
        elif cached is None:
            # These may be kept: as views of the joint projection they would keep the queries, too.
            key, value = key.contiguous(), value.contiguous()
        own = key, value
        if not finish:
            return segments, own
        if cached is not None and room is not None:
            start, stop = cached[0].shape[2], cached[0].shape[2] + key.shape[2]
            for buffer, new in zip(room, own, strict=True):
                buffer[:, :, start:stop] = new
            key, value = room[0][:, :, :stop], room[1][:, :, :stop]
        elif cached is not None:
            key, value = torch.cat([cached[0], key], dim=2), torch.cat([cached[1], value], dim=2)
        attended = attend(query, key, value, mask)
        pieces = attended.split([segment.tokens.shape[1] for segment in segments], dim=2)
        seconds = self.image_attention(segments, [modulation for _, modulation in inputs])
        out = [
            self.finish(segment, piece, modulation, second)
            for segment, piece, (_, modulation), second in zip(segments, pieces, inputs, seconds, strict=True)
        ]
        return out, own
