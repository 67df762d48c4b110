"""Sample grids during training: what the model makes of held-out conditions, beside the truth.

Works on collated batches, so that the model sees exactly what it is trained on. Knows nothing of the loop or of files.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unialignment.conditioning import Condition, Denoiser
from unialignment.diffusion.decoding import TextDecoding, decode
from unialignment.diffusion.guidance import Branch, Guidance
from unialignment.diffusion.solvers import sigma_schedule, solve
from unialignment.model.tokenizer import encode_conditions
from unialignment.training.batching import Batch
from unialignment.training.objective import Objective

Pictures = NDArray[np.uint8]


def to_pictures(images: Tensor) -> Pictures:
    """Float ``[B, 3, H, W]`` in [-1, 1] to uint8 ``[B, H, W, 3]``."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def draw(objective: Objective, batch: Batch, steps: int, guidance_scale: float = 1.0, seed: int = 0) -> Pictures:
    """Pictures ``[B, H, W, 3]`` for a batch with picture targets, by Euler steps from seeded noise."""
    target, sources = objective._latents(batch)
    assert target is not None
    embedder = objective.text_embedder
    conditions: dict[Branch, Condition] = {
        "full": Condition(embedder.embed(batch.prompt_ids, batch.prompt_mask), batch.prompt_mask, tuple(sources))
    }
    if guidance_scale != 1.0:
        ids, mask = encode_conditions(objective.tokenizer, [""] * len(batch))
        ids, mask = ids.to(target.device), mask.to(target.device)
        conditions["no_text"] = Condition(embedder.embed(ids, mask), mask, tuple(sources))
    guidance = Guidance(text_scale=guidance_scale)
    everyone = torch.arange(len(batch), device=target.device)
    denoiser = Denoiser(objective.transformer, conditions, everyone, cached=True)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).to(target)

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        return guidance.combine(denoiser.velocity(guidance.branches(bool(sources), sigma), latents, sigma))

    latents = solve(velocity, noise, sigma_schedule(steps, objective.flow.shift))
    return to_pictures(objective.autoencoder.decode(latents))


@torch.no_grad()
def write(objective: Objective, batch: Batch, steps: int) -> list[str]:
    """Texts for a batch with text targets, by confidence-based decoding of its maskable positions."""
    assert batch.target_ids is not None
    _, sources = objective._latents(batch)
    embedder = objective.text_embedder
    condition = Condition(embedder.embed(batch.prompt_ids, batch.prompt_mask), batch.prompt_mask, tuple(sources))
    everyone = torch.arange(len(batch), device=batch.target_ids.device)
    denoiser = Denoiser(objective.transformer, {"full": condition}, everyone, cached=True)
    maskable = batch.maskable if batch.maskable is not None else torch.ones_like(batch.target_ids, dtype=torch.bool)
    start = torch.where(maskable, objective.masked.mask_id, batch.target_ids)

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return denoiser.logits(("full",), embedder.embed(ids, None), positions)["full"]

    seeds = list(range(len(batch)))
    end = objective.tokenizer.pad_token_id
    ids = decode(logits, start, objective.masked, TextDecoding(steps=steps), seeds, end_id=end)
    texts: list[str] = objective.tokenizer.decode(batch.without_questions(ids))
    return texts
