"""The benchmark of kernels: every pair computes the same thing, whatever it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def kernels(script: Any) -> Any:
    return script("kernels")


@torch.no_grad()
def test_both_sides_agree(kernels: Any) -> None:
    torch.manual_seed(0)
    pairs = [
        kernels.attention(1, 2, 16, 9, 20),
        kernels.int8(8, 64),
        kernels.projections(8, 128, torch.float32),
        kernels.projections(8, 128, torch.bfloat16),
    ]
    for before, after in pairs:
        for old, new in zip(kernels._tensors(before()), kernels._tensors(after()), strict=True):
            assert (new - old).norm() < 0.05 * old.norm()


def test_unknown_cases_are_refused(kernels: Any) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--only", "no such kernel"])
