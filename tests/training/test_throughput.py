"""Speed: operations against closed forms, rates against what was measured, gradient norms of single losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from unialignment.training.logging import read_metrics
from unialignment.training.loop import Trainer
from unialignment.training.throughput import Throughput, combined, gemm_rate, step_flops

FEW = "mixture={generate: 2, edit: 1, perceive: 0, control: 0, compose: 0, caption: 2, answer: 1, infill: 0}"


def test_operations_of_a_step_are_three_passes_and_one_of_what_is_frozen() -> None:
    frozen, trained, x = nn.Linear(8, 16), nn.Linear(16, 4), torch.ones(5, 8)
    first, second = 2 * 5 * 8 * 16, 2 * 5 * 16 * 4
    assert step_flops(lambda: trained(frozen(x))) == 3 * (first + second)
    assert step_flops(lambda: trained(frozen(x)), lambda: frozen(x)) == first + 3 * second


def test_rates_are_what_was_done_over_what_it_took() -> None:
    assert Throughput(4, 2.0, 600, 50.0, 400.0).numbers() == {
        "tokens_per_second": 300.0, "flops_per_second": 100.0, "model_flops_utilisation": 0.25,
    }  # fmt: skip
    assert Throughput(4, 2.0, 600, 0.0, 400.0).numbers() == {"tokens_per_second": 300.0}
    parts = [{"sums": {"a": 3.0, "b": 8.0}, "counts": {"a": 2, "b": 2}}, {"sums": {"a": 5.0}, "counts": {"a": 2}}]
    assert combined(parts) == {"a": 2.0, "b": 2.0}


def test_a_run_shows_its_speed_and_the_gradient_of_each_loss(tiny, tmp_path: Path, silent) -> None:
    options = ["run.max_steps=2", "logging.gradient_norms_every=1", "run.threads=1", "loss.text=0.4"]
    trainer = Trainer(tiny(FEW, *options), silent)
    trainer.train()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    speed = next(r for r in records if "train/tokens_per_second" in r)
    rate = gemm_rate(torch.device("cpu"), "fp32")  # remembered, so this is what the run held itself against
    assert speed["train/model_flops_utilisation"] == pytest.approx(speed["train/flops_per_second"] / rate, rel=1e-4)
    assert (
        speed["train/tokens_per_second"] > speed["train/samples_per_second"] > 0 and speed["train/memory_bytes"] > 1e7
    )
    norms = next({k: v for k, v in r.items() if k.startswith("gradients/")} for r in records if "gradients/image" in r)
    assert set(norms) == {"gradients/image", "gradients/text", "gradients/cross"}

    batches, _ = trainer.source()(7)
    found = trainer.loss_gradient_norms([(batches, {})])
    assert all(parameter.grad is None for parameter in trainer.parameters)
    trainer.noise.manual_seed(0)
    trainer.objective(batches, trainer.noise).parts["text"].backward()
    squares = [p.grad.square().sum() for p in trainer.parameters if p.grad is not None]
    assert found["text"] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)
    assert found["image"] != pytest.approx(found["text"])
