"""Decoding text from a masked-diffusion model: which masked positions to fill, with what, in how many steps.

Knows nothing of networks or tokenizers: logits are a function of token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unialignment.diffusion.base import drive
from unialignment.diffusion.masked import MaskedPath
from unialignment.errors import InputError

Logits = Callable[[Tensor, Tensor], Tensor]
"""``(ids [B, L], open positions bool [B, L]) -> logits [M, V]`` at the M open positions, row-major."""
TextCallback = Callable[[int, Tensor], None]
"""``(step, ids [B, L])`` after every step."""
METHODS = ("confidence", "ancestral")


@dataclass(frozen=True)
class TextDecoding:
    """Decoding settings.

    Attributes:
        method: ``"confidence"``: each step fills the positions the model is surest of (MaskGIT, arXiv 2202.04200), of
            two neighbours with the same token the surer one only, but in the last step;
            ``"ancestral"``: each position is unmasked at a random time of the reverse process (MDLM, section 3.4).
        steps: Upper bound of denoising steps; decoding stops as soon as nothing is masked.
        temperature: 0: most likely token; above: sampled.
        top_p: Sample from the smallest set of tokens with this probability.
        threshold: With ``"confidence"``: also fill, in the same step, every position whose token has at least this
            probability (confidence-aware parallel decoding, Fast-dLLM, arXiv 2505.22618), and the one other position
            that is left when all but one are. Fewer steps, and another result where the model is sure of two words
            that don't fit together. 1: none, ``steps`` alone decides.

    Raises:
        InputError: a field is out of range.
    """

    method: str = "confidence"
    steps: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"decoding={self.method!r} is unknown: use one of {', '.join(METHODS)}.")
        if self.steps < 1:
            raise InputError(f"text steps={self.steps} must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError("temperature must be at least 0 and top_p between 0 (excluded) and 1.")
        if not 0 < self.threshold <= 1:
            raise InputError(f"confidence_threshold={self.threshold} must lie between 0 (excluded) and 1.")


def decode(
    logits: Logits,
    ids: Tensor,
    path: MaskedPath,
    settings: TextDecoding,
    seeds: Sequence[int],
    end_id: int | None = None,
    callback: TextCallback | None = None,
) -> Tensor:
    """Fills every masked position of ``ids``.

    Args:
        logits: The model.
        ids: ``[B, L]``; masked where to write, given words elsewhere.
        path: The diffusion (its mask id and schedule).
        settings: How to decode.
        seeds: One a sample; a sample's result depends on its own seed alone.
        end_id: Token that ends a text; positions after a written end are closed with it at once.
        callback: Called after every step.

    Returns:
        ``[B, L]`` without masks.
    """
    return drive(decoding_steps(ids, path, settings, seeds, end_id, callback), logits)


def decoding_steps(
    ids: Tensor,
    path: MaskedPath,
    settings: TextDecoding,
    seeds: Sequence[int],
    end_id: int | None = None,
    callback: TextCallback | None = None,
) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
    """:func:`decode` turned inside out: yields ``(ids, open positions)``, is sent the logits there, returns the ids.

    Whoever drives several of these can evaluate what they ask for in one pass, at different steps.
    """
    ids = ids.clone()
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    writable = ids == path.mask_id
    # Every position's randomness is drawn ahead, so that it doesn't depend on when neighbours in the batch are filled.
    # Ancestral: with the log-linear schedule a token's unmasking time is uniform. The network isn't called in steps in
    # which nothing is unmasked; that is the published sampler's caching, made explicit.
    times = torch.stack([torch.rand(ids.shape[1], generator=g) for g in generators]).to(ids.device)
    draws = torch.stack([torch.rand(ids.shape[1], generator=g) for g in generators]).to(ids.device)
    for step in range(settings.steps):
        masked = ids == path.mask_id
        if not bool(masked.any()):
            break
        if settings.method == "ancestral":
            threshold = 1 - (step + 1) / settings.steps
            chosen = masked & ((times >= threshold) | (step == settings.steps - 1))
            if not bool(chosen.any()):
                continue
            logits = yield ids, masked
            tokens, _ = _draw(path.subs(logits), masked, settings, draws)
        else:
            logits = yield ids, masked
            tokens, confidence = _draw(path.subs(logits), masked, settings, draws)
            remaining = masked.sum(1)
            quota = (remaining + settings.steps - step - 1) // (settings.steps - step)
            rank = confidence.masked_fill(~masked, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
            chosen = masked & (rank < quota.unsqueeze(1))
            if settings.threshold < 1:
                chosen |= _parallel(tokens, confidence, ids, masked, writable, settings.threshold, end_id)
            if step < settings.steps - 1:
                chosen &= ~_echoes(tokens, confidence, chosen, end_id)
        ids = torch.where(chosen, tokens, ids)
        if end_id is not None:
            ended = ((ids == end_id) & writable).cumsum(1) > 0
            ids = torch.where(ended & (ids == path.mask_id), end_id, ids)
        if callback is not None:
            callback(step, ids)
    return ids


def _parallel(
    tokens: Tensor,
    confidence: Tensor,
    ids: Tensor,
    masked: Tensor,
    writable: Tensor,
    threshold: float,
    end_id: int | None,
) -> Tensor:
    """Which masked positions ``[B, L]`` can be filled together: the sure ones, and one that is left alone.

    If n positions have their tokens with probability 1 − ε at least, the distribution of one further position given
    those tokens is, in total variation, within n·ε of what it is now (union bound): another pass would tell it little.
    An answer of one word takes one pass that way, however unsure its word is. Positions behind a sure end don't count:
    they will be closed with it.
    """
    sure = masked & (confidence >= threshold)
    open_ones = masked & ~sure
    if end_id is not None:
        ended = ((torch.where(sure, tokens, ids) == end_id) & writable).cumsum(1) > 0
        open_ones &= ~ended
    return sure | (open_ones & (open_ones.sum(1, keepdim=True) == 1))


def _echoes(tokens: Tensor, confidence: Tensor, chosen: Tensor, end_id: int | None) -> Tensor:
    """Which chosen positions ``[B, L]`` had better wait: the less sure of two neighbours with the same token.

    A word that may stand at either of two places is likely at both, as neither knows of the other in the same pass;
    filled together they would say it twice. The next pass sees the one and decides. Ends follow ends, so they don't
    count.
    """
    same = chosen[:, 1:] & chosen[:, :-1] & (tokens[:, 1:] == tokens[:, :-1])
    if end_id is not None:
        same &= tokens[:, 1:] != end_id
    later_waits = confidence[:, 1:] <= confidence[:, :-1]
    echoes = torch.zeros_like(chosen)
    echoes[:, 1:] |= same & later_waits
    echoes[:, :-1] |= same & ~later_waits
    return echoes


def _draw(logits: Tensor, masked: Tensor, settings: TextDecoding, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token and its probability for every masked position, as ``[B, L]`` (other positions: 0).

    Args:
        logits: ``[M, V]`` at the masked positions.
        masked: Bool ``[B, L]``.
        settings: Temperature and top-p.
        draws: ``[B, L]`` uniform numbers that choose the tokens when sampling.
    """
    probabilities = torch.softmax(logits / (settings.temperature or 1.0), dim=-1)
    if settings.temperature == 0:
        confidence, token = probabilities.max(-1)
    else:
        if settings.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            ordered = ordered * ((ordered.cumsum(-1) - ordered) < settings.top_p)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        # Inverse-transform sampling, in float64 because rounding would make rare tokens unreachable.
        cumulative = probabilities.double().cumsum(-1)
        target = draws[masked].to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
        confidence = probabilities.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    tokens = torch.zeros(masked.shape, dtype=torch.long, device=masked.device).masked_scatter(masked, token)
    return tokens, torch.zeros(masked.shape, device=masked.device).masked_scatter(masked, confidence)
