"""Which parameters decay, and that orthogonalisation does what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unialignment.training.config import OptimizerSection
from unialignment.training.optimizer import build_optimizer, decayed_parameters, orthogonalise


def net() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))])
    module.table = nn.Embedding(4, 8)
    module.position = nn.Parameter(torch.zeros(4, 8))
    module.convolution = nn.Conv2d(3, 4, 2)
    return module


def test_only_matrices_of_layers_decay() -> None:
    assert decayed_parameters(net()) == {"blocks.0.0.weight", "convolution.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_shrinks_matrices_and_nothing_else(name: str) -> None:
    module = net()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = build_optimizer(module, OptimizerSection(name=name, lr=0.1, weight_decay=0.5))  # type: ignore[arg-type]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in module.named_parameters():
        expected = before[n] * (1 - 0.1 * 0.5) if n in decayed_parameters(module) else before[n]
        assert torch.allclose(p, expected, atol=1e-7), n


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16), (1, 8, 12)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], shape[1], shape[1]))[0]
    right = torch.linalg.qr(torch.randn(shape[0], shape[2], shape[2]))[0]
    rank = min(shape[1:])
    values = torch.linspace(0.3, 1.0, rank)
    matrices = left[..., :rank] @ torch.diag(values) @ right[:, :rank]
    result = orthogonalise(matrices)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6 and singular.max() < 1.3
    inner = left[..., :rank].mT @ result @ right[:, :rank].mT  # diagonal: the singular vectors are unchanged
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 48, 192), (2, 192, 48)])
@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_of_low_rank_do_not_explode(dtype: torch.dtype, shape: tuple[int, ...], rank: int) -> None:
    # What gradients of short batches are like: few directions, and rounding noise in all others.
    torch.manual_seed(0)
    low = torch.randn(shape[0], shape[1], rank) @ torch.randn(shape[0], rank, shape[2]) * 1e-3
    result = orthogonalise(low.to(dtype)).float()
    assert torch.linalg.svdvals(result).max() < 1.5
    assert result.norm(dim=(-2, -1)).max() < 1.3 * min(shape[1:]) ** 0.5


def test_muon_minimises() -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(8, 8)])
    data = torch.randn(32, 8)
    target = data @ torch.randn(8, 8)
    optimizer = build_optimizer(module, OptimizerSection(name="muon", lr=0.2, weight_decay=0))
    losses = []
    for _ in range(100):
        loss = (module.blocks[0](data) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
