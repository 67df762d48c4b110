"""The guard: what it refuses, what it remembers, what it writes down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unialignment.errors import UniAlignmentError
from unialignment.training.guard import ENOUGH, StepGuard
from unialignment.training.loop import Trainer

FEW = "mixture={generate: 2, edit: 1, perceive: 0, control: 0, compose: 0, caption: 2, answer: 1, infill: 0}"


def test_spikes_are_judged_by_the_recent_median_once_there_is_one() -> None:
    guard = StepGuard(5.0, 2)
    assert guard.judge(1000.0) is None  # the first steps of a run may be anything
    for step in range(ENOUGH):
        assert guard.judge(1.0 + 0.001 * step) is None
    assert "1000" not in (guard.judge(5.0) or "") and guard.skipped == 0
    reason = guard.judge(5.3)
    assert reason is not None and "times the usual" in reason and guard.skipped == 1
    assert guard.judge(float("nan")) == guard.judge(float("inf")) == "its loss or gradient is not finite"
    assert guard.skipped == 3 and guard.exhausted


def test_skipped_steps_do_not_move_the_median_and_survive_a_restart() -> None:
    guard = StepGuard(5.0, 10)
    for _ in range(ENOUGH):
        guard.judge(1.0)
    for _ in range(5):
        assert guard.judge(100.0) is not None
    other = StepGuard(5.0, 10)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.skipped == 5 and other.judge(100.0) is not None and other.judge(1.0) is None


def test_without_a_factor_only_what_is_not_finite_is_refused() -> None:
    guard = StepGuard(None, 1)
    assert all(guard.judge(1.0) is None for _ in range(ENOUGH)) and guard.judge(1e9) is None
    assert guard.judge(float("nan")) is not None


def test_the_offending_batch_is_written_down(tiny, tmp_path: Path, silent, monkeypatch) -> None:
    trainer = Trainer(tiny(FEW, "run.max_skipped_steps=1"), silent)
    data = trainer.source()
    real = trainer.objective.forward

    def poisoned(batches, generator):
        output = real(batches, generator)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(trainer.objective, "forward", poisoned)
    trainer.step([data(0)])
    with pytest.raises(UniAlignmentError, match=r"skipped\.jsonl"):
        trainer.step([data(1)])
    entries = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1] and entries[0]["gradient_norm"] is None
    (micro,) = entries[1]["micro_batches"]
    assert micro["position"] == 1
    samples = micro["samples"]
    assert sorted(s["task"] for s in samples) == ["answer", "caption", "caption", "edit", "generate", "generate"]
    assert all(s.get("target") for s in samples if s["task"] in ("caption", "answer"))
    assert any(s["prompt"] for s in samples)
    stored = load_file(tmp_path / "run/skipped/step-00000001-process-0.safetensors")
    batches, _ = data(1)
    assert torch.equal(stored["0.0.target_images"], batches[0].target_images)
