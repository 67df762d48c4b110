"""Several processes train what one does: same losses, same averaged weights, checkpoints that either can take up."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from unialignment.training.config import TransformerConfig
from unialignment.training.loop import Trainer

Make = Callable[..., TransformerConfig]
MODEL = "model/transformer/diffusion_pytorch_model.safetensors"


def assert_same_run(workers: ModuleType, one: Path, other: Path, steps: int, tolerance: float = 1e-4) -> None:
    first, second = workers.curve(one), workers.curve(other)
    assert len(first) == len(second) == steps
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert math.isclose(value, b[name], rel_tol=tolerance, abs_tol=tolerance), name
    weights, others = load_file(one / MODEL), load_file(other / MODEL)  # the averages
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=tolerance, atol=tolerance)


ROWS = ["run.max_steps=3"]
"""One micro-batch a step: its rows are shared out, and pairs are gathered with gradient."""
WHOLE = ["run.max_steps=3", "micro_batches=2", "loss.negatives=step"]
"""Two micro-batches a step: copies take one each, shards share the rows of both; pairs meet through GradCache."""

LOOKED_AT = [*WHOLE, "logging.samples=true", "logging.validation_steps=2"]
"""The same, with samples drawn in its midst, which must change nothing."""


@pytest.fixture(scope="module")
def two(workers: ModuleType, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Short runs of two processes: ``ddp-rows``, ``ddp-whole``, ``fsdp-whole``."""
    folder = tmp_path_factory.mktemp("two")
    plans = [
        workers.plan(folder / f"{kind}-{name}", tokenizer_folder, *options, f"run.parallel={kind}")
        for kind, name, options in (("ddp", "rows", ROWS), ("ddp", "whole", WHOLE), ("fsdp", "whole", LOOKED_AT))
    ]
    codes, said = workers.launch(folder, plans)
    assert codes == [[0] * len(plans)] * 2, said
    assert said.count("Finished after 3 steps") == 3  # said once, not by every process
    return folder


@pytest.mark.parametrize(("name", "options"), [("rows", ROWS), ("whole", WHOLE)])
def test_two_processes_train_what_one_does(
    workers: ModuleType, two: Path, tiny: Make, tmp_path: Path, silent, name: str, options: list[str]
) -> None:
    Trainer(tiny(workers.FEW, *options), silent).train()
    for other in sorted(two.glob(f"*-{name}")):
        assert_same_run(workers, tmp_path / "run", other, 3)


def test_one_process_goes_on_where_two_with_shards_stopped(
    workers: ModuleType, two: Path, tiny: Make, tmp_path: Path, silent
) -> None:
    whole = tmp_path / "whole"
    Trainer(
        tiny(workers.FEW, *WHOLE, "run.max_steps=4", "optimizer.schedule=constant", f"run.dir={whole}"), silent
    ).train()
    shards = next((two / "fsdp-whole" / "checkpoints").glob("step-*/shards"))
    assert {p.name for p in shards.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    shutil.copytree(two / "fsdp-whole", tmp_path / "run")
    trainer = Trainer(tiny(workers.FEW, *WHOLE, "run.max_steps=4", "optimizer.schedule=constant"), silent)
    trainer.train()
    assert trainer.resumed_at == 3 and len(workers.curve(tmp_path / "run")) == 4
    state = trainer.optimizer.state_dict()["state"]
    assert all(torch.isfinite(entry["exp_avg"]).all() and float(entry["step"]) <= 4 for entry in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fifty_steps_of_two_processes_stay_those_of_one(
    workers: ModuleType, tiny: Make, tmp_path: Path, tokenizer_folder: Path, silent, kind: str
) -> None:
    options = ["run.max_steps=50", "micro_batches=2"]
    codes, said = workers.launch(
        tmp_path, [workers.plan(tmp_path / "two", tokenizer_folder, *options, f"run.parallel={kind}")]
    )
    assert codes == [[0], [0]], said
    Trainer(tiny(workers.FEW, *options), silent).train()
    assert_same_run(workers, tmp_path / "run", tmp_path / "two", 50)
