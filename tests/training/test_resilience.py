"""Runs that are killed, also in the midst of a save, that meet a full disk, or lose a process.

Nothing that was saved is lost, and what is resumed becomes what it would have been.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from unialignment.training.checkpoint import CheckpointStore
from unialignment.training.parallel import Parallel
from unialignment.training.sharded import load_tensors

OFTEN = ["run.checkpoint_minutes=1e-9", "run.max_steps=7", "micro_batches=2"]


def lives(
    workers: ModuleType, folder: Path, tokenizer: Path, kills: list[tuple[int, str]], *options: str, rank: int = 0
) -> list[dict]:
    """Starts of one run: each killed as told, the last left alone."""
    starts = [workers.plan(folder, tokenizer, *options, rank=rank, step=step, how=how) for step, how in kills]
    return [*starts, workers.plan(folder, tokenizer, *options)]


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and optimizer state of the last checkpoint, whichever kind it is."""
    latest = CheckpointStore(folder / "checkpoints").latest()
    assert latest is not None
    tensors = load_tensors(latest, lambda *_: None, Parallel())
    return {k: v for k, v in tensors.items() if k.startswith(("model.", "ema.", "optimizer."))}


def some_kills(seed: int, steps: int = 7) -> list[tuple[int, str]]:
    """A few steps in increasing order, some of them in the midst of their save."""
    rng = random.Random(seed)
    return [(step, rng.choice(["SIGKILL", "save"])) for step in sorted(rng.sample(range(1, steps), 2))]


def killed_run_equals_whole_one(
    workers: ModuleType, folder: Path, tokenizer: Path, kills: list[tuple[int, str]]
) -> None:
    plans = lives(workers, folder / "killed", tokenizer, kills, *OFTEN)
    plans.append(workers.plan(folder / "whole", tokenizer, *OFTEN))
    codes, said = workers.launch(folder, plans, processes=1)
    assert codes == [[*([-9] * len(kills)), 0, 0]], said
    assert (
        workers.curve(folder / "killed") == workers.curve(folder / "whole")
        and len(workers.curve(folder / "whole")) == 7
    )
    killed, whole = final(folder / "killed"), final(folder / "whole")
    assert killed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(killed[name], value), name


def test_a_run_that_is_killed_twice_ends_bit_for_bit_the_same(
    workers: ModuleType, tmp_path: Path, tokenizer_folder: Path
) -> None:
    killed_run_equals_whole_one(workers, tmp_path, tokenizer_folder, [(2, "SIGKILL"), (5, "save")])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_it_does_so_wherever_it_is_killed(
    workers: ModuleType, tmp_path: Path, tokenizer_folder: Path, seed: int
) -> None:
    killed_run_equals_whole_one(workers, tmp_path, tokenizer_folder, some_kills(seed))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("seed", range(2))
def test_two_processes_of_which_one_is_killed_go_on_within_tolerance(
    workers: ModuleType, tmp_path: Path, tokenizer_folder: Path, kind: str, seed: int
) -> None:
    """Once between saves and once in the midst of one: losses, weights, averages and optimizer are one process's."""
    options = [*OFTEN, f"run.parallel={kind}"]
    rank = 0 if kind == "ddp" else seed  # who writes can be killed while writing
    rng = random.Random(seed)
    kills = list(zip(sorted(rng.sample(range(1, 7), 2)), rng.sample(["SIGKILL", "save"], 2), strict=True))
    plans = lives(workers, tmp_path / "killed", tokenizer_folder, kills, *options, rank=rank)
    codes, said = workers.launch(tmp_path, plans)
    assert codes[rank] == [-9, -9, 0] and codes[1 - rank] == [2, 2, 0], said
    assert "lost another process of this run" in said and "resumes from the last checkpoint" in said
    codes, said = workers.launch(
        tmp_path / "one", [workers.plan(tmp_path / "whole", tokenizer_folder, *OFTEN)], processes=1
    )
    assert codes == [[0]], said
    killed, whole = workers.curve(tmp_path / "killed"), workers.curve(tmp_path / "whole")
    assert len(killed) == len(whole) == 7
    for one, other in zip(killed, whole, strict=True):
        assert one.keys() == other.keys()
        assert all(value == pytest.approx(other[name], rel=1e-4, abs=1e-4) for name, value in one.items())
    ours, theirs = final(tmp_path / "killed"), final(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and any(name.startswith("ema.") for name in ours)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_share_their_fate(workers: ModuleType, tmp_path: Path, tokenizer_folder: Path) -> None:
    """One that dies stops the other with an explanation; a signal to one stops all cleanly; a full disk in one is a
    clear error of all; what was saved is taken up."""
    common = ["run.checkpoint_minutes=1e-9", "run.max_steps=4", "run.parallel=fsdp"]
    folder = tmp_path / "run"
    plans = [
        workers.plan(folder, tokenizer_folder, *common, rank=1, step=1, how="SIGKILL"),
        workers.plan(folder, tokenizer_folder, *common, rank=1, step=1, how="SIGTERM"),
        workers.plan(folder, tokenizer_folder, *common, rank=1, step=3, how="full"),
        workers.plan(folder, tokenizer_folder, *common),
    ]
    codes, said = workers.launch(tmp_path, plans)
    assert codes == [[2, 0, 2, 0], [-9, 0, 2, 0]], said
    assert (
        "process 0 lost another process of this run after step 1" in said and "Nothing that was saved is lost" in said
    )
    assert "resumed at step 1" in said
    assert "Stopped by SIGTERM after step 2; everything is saved" in said
    assert said.count("Could not save the checkpoint of step 3") == 2 and "the disk is full" in said
    assert "resumed at step 2" in said and "Finished after 4 steps" in said
    assert [record["step"] for record in workers.curve(folder)] == [1, 2, 3, 4]
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
