"""The launchers that the guide names, each starting two processes on this machine's processors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launched(repo_root: Path, *command: str) -> tuple[int, str]:
    """Exit code and everything that was said."""
    kept = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=repo_root,
        env={**kept, "PYTHONPATH": str(repo_root / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (["--multi_gpu"], "2 processes (ddp)"),
        (["--config_file", "examples/cluster/accelerate-fsdp.yaml"], "2 processes (fsdp)"),
        (["--cpu"], None),
    ],
)
def test_accelerate_launch_on_processors(
    workers: ModuleType, tokenizer_folder: Path, tmp_path: Path, repo_root: Path, options: list[str], processes: str
) -> None:
    run = workers.plan(tmp_path / "run", tokenizer_folder, "run.max_steps=2")["overrides"]
    port = ["--main_process_port", free_port(), "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    code, said = launched(
        repo_root, "accelerate.commands.launch", *options, *port, *plain, "-m", "unialignment.cli", "train",
        "configs/tiny.yaml", *run,
    )  # fmt: skip
    assert code == 0, said
    assert said.count("Finished after 2 steps") == 1, said
    assert (processes in said) if processes else ("processes (" not in said)


def test_torchrun_starts_all_again_when_one_dies_and_they_resume(
    workers: ModuleType, tokenizer_folder: Path, tmp_path: Path, repo_root: Path
) -> None:
    options = ["run.max_steps=4", "run.checkpoint_minutes=1e-9", "run.parallel=ddp"]
    plan = workers.plan(tmp_path / "run", tokenizer_folder, *options, rank=1, step=2, how="SIGKILL")
    (tmp_path / "plan.json").write_text(json.dumps([plan]))
    code, said = launched(
        repo_root, "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}",
        "tests/training/worker.py", str(tmp_path / "plan.json"), "once",
    )  # fmt: skip
    assert code == 0, said
    assert "resumed at step 2" in said and said.count("Finished after 4 steps") == 1
    assert [record["step"] for record in workers.curve(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_stages_follow_on_one_another(tokenizer_folder: Path, tmp_path: Path, repo_root: Path, silent) -> None:
    """The configurations as they are, but small: each stage begins with the averages that the one before left."""
    import torch

    from unialignment.training.config import load_config
    from unialignment.training.loop import Trainer

    before = None
    for path in sorted((repo_root / "configs" / "stages").glob("*.yaml")):
        told = load_config(path, [])
        small = {task: min(count, 2) for task, count in told.mixture.items()}
        options = [
            f"run.dir={tmp_path / path.stem}", "run.max_steps=2", "micro_batches=2", f"mixture={json.dumps(small)}",
            "autoencoder.path=null", "logging={validation_samples: 1, samples: false, tensorboard: false}",
            "data.workers=0", "run.threads=1",
        ]  # fmt: skip
        if before is None:
            options += ["model.flavour=tiny", "model.transformer.patch_size=8", f"text.tokenizer={tokenizer_folder}"]
        else:
            assert str(told.model.initial) == f"runs/{before.config.run.name}/model"
            options.append(f"model.initial={before.folder / 'model'}")
        trainer = Trainer(load_config(path, options), silent)
        if before is not None:
            for name, value in trainer.objective.transformer.named_parameters():
                assert torch.equal(value, before.ema.shadow[f"transformer.{name}"]), name
        trainer.train()
        before = trainer
    assert before is not None and before.config.run.name == "stage-3-compose"
