"""Checkpoints: complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from unialignment.errors import CheckpointError, StorageError
from unialignment.training import checkpoint as module
from unialignment.training.checkpoint import (
    CheckpointStore,
    flatten_optimizer,
    random_states,
    restore_optimizer,
    restore_random_states,
)
from unialignment.training.config import OptimizerSection
from unialignment.training.optimizer import build_optimizer


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 4), value), "b": torch.arange(5)}


def test_round_trip_and_keep_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", keep=2)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="No usable checkpoint"):
        store.load()
    for step in (1, 2, 3):
        store.save(step, tensors(step), {"note": f"step {step}"})
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]
    loaded, state = store.load()
    assert state == {"step": 3, "note": "step 3"}
    assert torch.equal(loaded["a"], tensors(3)["a"]) and torch.equal(loaded["b"], tensors(3)["b"])


@pytest.mark.parametrize("victim", ["write_tensors", "write_json", "write_text"])
def test_a_full_disk_leaves_earlier_checkpoints_in_force(tmp_path: Path, monkeypatch, victim: str) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors(1), {})

    real = module.save_file

    def half(own: dict[str, torch.Tensor], path: Path) -> None:
        real({"a": own["a"]}, path)  # something is on disk already when it fills up
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(*_: object) -> None:
        raise StorageError("could not write: the disk is full")

    if victim == "write_tensors":
        monkeypatch.setattr(module, "save_file", half)
    else:
        monkeypatch.setattr(module, victim, full)
    with pytest.raises(StorageError, match=r"(?s)step 2.*disk is full.*intact"):
        store.save(2, tensors(2), {})
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    if victim != "write_text":
        assert not (tmp_path / "step-00000002").exists()
    assert (tmp_path / "latest").read_text() == "step-00000001"
    assert store.load()[1]["step"] == 1
    store.save(3, tensors(3), {})
    assert store.load()[1]["step"] == 3


def test_the_operating_systems_own_refusal_is_understood(tmp_path: Path) -> None:
    """A real limit on the size of files, which the library that writes tensors meets half-way through."""
    resource = pytest.importorskip("resource")
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(StorageError, match=r"step 2.*disk is full or a size limit.*intact"):
            store.save(2, {"a": torch.zeros(1 << 18)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"] and store.load()[1]["step"] == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_latest_is_passed_over(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, tensors(1), {})
    newest = store.save(2, tensors(2), {})
    file = newest / "tensors.safetensors"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-3])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(newest)
    assert store.load()[1]["step"] == 1


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_best=2)
    for step, score in enumerate([5.0, 3.0, 4.0, 9.0, 2.0, 8.0], 1):
        better = store.is_better(score)
        store.save(step, tensors(step), {})
        assert better == (step not in (4, 6))
        if better:
            store.mark_best(step, score)
    assert store.best() == [{"step": 5, "score": 2.0}, {"step": 2, "score": 3.0}]
    kept = sorted(p.name for p in tmp_path.glob("step-*"))
    assert kept == ["step-00000002", "step-00000005", "step-00000006"] and store.load()[1]["step"] == 6
    again = CheckpointStore(tmp_path, keep=1, keep_best=2)  # after a restart
    assert again.is_better(2.5) and not again.is_better(3.5)
    again.save(7, tensors(7), {})
    again.mark_best(7, 1.0)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005", "step-00000007"]
    assert not CheckpointStore(tmp_path).is_better(0.0)  # none are wanted
    (tmp_path / "best.json").write_text("{")
    assert again.best() == [] and again.is_better(99.0)


def test_what_a_killed_save_left_is_ignored_and_cleaned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    left = tmp_path / ".step-00000002.abc.part"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert store.load()[1]["step"] == 1
    store.save(2, tensors(2), {})
    assert not left.exists() and store.load()[1]["step"] == 2


def test_a_pointer_to_nowhere_does_not_matter(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(4, tensors(4), {})
    (tmp_path / "latest").write_text("step-99999999")
    assert store.load()[1]["step"] == 4


def test_saving_the_same_step_twice_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    store.save(1, tensors(9), {})
    assert store.load()[0]["a"][0, 0] == 9


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": weight, "tied": weight, "part": weight[2:]}, {})
    loaded, _ = store.load()
    assert torch.equal(loaded["tied"], weight) and torch.equal(loaded["part"], weight[2:])


def test_random_states_continue_all_three_generators() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    torch.rand(5), np.random.normal(size=3), random.gauss(0, 1)
    kept, plain = random_states()
    plain = json.loads(json.dumps(plain))  # as in state.json
    expected = (torch.rand(3), np.random.normal(size=3), [random.gauss(0, 1), random.random()])
    torch.rand(7), np.random.rand(7), random.random()
    restore_random_states(kept, plain)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.normal(size=3), expected[1])
    assert [random.gauss(0, 1), random.random()] == expected[2]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.table = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.norm(x).square().mean() + x.mean()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_round_trip_is_bit_exact(tmp_path: Path, name: str) -> None:
    options = OptimizerSection(name=name, lr=0.05)  # type: ignore[arg-type]
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])

    def advance(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(ids).backward()
            optimizer.step()

    torch.manual_seed(0)
    net = Blocks()
    optimizer = build_optimizer(net, options)
    advance(net, optimizer, 3)
    kept, plain = flatten_optimizer(optimizer)
    store = CheckpointStore(tmp_path)
    store.save(3, {f"o.{k}": v for k, v in kept.items()} | {f"m.{k}": v for k, v in net.state_dict().items()}, plain)
    advance(net, optimizer, 3)

    loaded, state = store.load()
    torch.manual_seed(1)
    other = Blocks()
    second = build_optimizer(other, options)
    other.load_state_dict({k[2:]: v for k, v in loaded.items() if k.startswith("m.")})
    restore_optimizer(second, {k[2:]: v for k, v in loaded.items() if k.startswith("o.")}, state)
    advance(other, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
