"""The average really moves, by the closed form, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unialignment.training.ema import ExponentialMovingAverage


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].bias.requires_grad_(False)
    return net


def test_closed_form_without_warm_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = ExponentialMovingAverage(net, decay=0.9, warmup=False)
    net.weight.data.fill_(1.0)
    for _ in range(5):
        ema.update()
    assert ema.shadow["weight"].item() == pytest.approx(1 - 0.9**5)


def test_warm_up_forgets_the_initialisation_early() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = ExponentialMovingAverage(net, decay=0.9999)
    net.weight.data.fill_(1.0)
    decays = []
    for _ in range(50):
        decays.append(ema.current_decay())
        ema.update()
    assert decays[0] == pytest.approx(0.1) and decays == sorted(decays)
    assert ema.shadow["weight"].item() > 0.99
    assert ExponentialMovingAverage(net, decay=0.5).current_decay() <= 0.5


def test_applied_swaps_in_and_restores_even_after_an_error() -> None:
    net = model()
    ema = ExponentialMovingAverage(net, decay=0.5, warmup=False)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.data.add_(1.0)
    ema.update()
    own = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.allclose(net[0].weight, before["0.weight"] + 0.5)
        assert torch.equal(net[2].bias, own["2.bias"])  # frozen: not averaged
        raise RuntimeError
    assert all(torch.equal(p, own[n]) for n, p in net.named_parameters())


def test_state_round_trip_and_wrong_shape() -> None:
    net = model()
    ema = ExponentialMovingAverage(net, decay=0.9)
    net[0].weight.data.add_(1)
    ema.update()
    other = ExponentialMovingAverage(model(), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1 and torch.equal(other.shadow["0.weight"], ema.shadow["0.weight"])
    bad = {**ema.state_dict(), "shadow.0.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(bad)


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match="decay"):
        ExponentialMovingAverage(model(), decay=1.0)
