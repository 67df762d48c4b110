"""Several processes in tests: how they are started, and what each does: train the runs of a plan, each in a child.

Called as ``worker.py PLAN.json``; the plan lists ``{"overrides": [...], "port": ..., "disturb": ...}``. Writes the exit
codes (negative: killed by that signal) beside the plan. Under ``torchrun``, as ``worker.py PLAN.json once``: trains the
first run, which is disturbed at torchrun's first attempt only. Not a test.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from rich.console import Console
from torch.distributed.checkpoint import FileSystemWriter

from unialignment.errors import UniAlignmentError
from unialignment.training import checkpoint
from unialignment.training.config import load_config
from unialignment.training.logging import read_metrics
from unialignment.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
FEW = "mixture={generate: 3, edit: 1, perceive: 1, control: 0, compose: 2, caption: 3, answer: 1, infill: 0}"


def plan(folder: Path, tokenizer: Path, *overrides: str, **disturbance: object) -> dict:
    """A run of the tiny flavour; ``disturbance`` holds arguments of :func:`disturb`."""
    common = [
        f"run.dir={folder}",
        f"text.tokenizer={tokenizer}",
        "data.workers=0",
        "logging.tensorboard=false",
        "logging.log_every=1",
        "logging.validation_samples=2",
        "logging.samples=false",
        "run.threads=1",
        FEW,
    ]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return {"overrides": [*common, *overrides], "port": port, "disturb": disturbance or None}


def launch(folder: Path, plans: list[dict], processes: int = 2) -> tuple[list[list[int]], str]:
    """Run plans on several processes; their exit codes by process and plan, and everything that was said."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps(plans))
    running = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        names |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT / "src"}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        with (folder / f"out-{rank}.txt").open("w") as out:
            command = [sys.executable, __file__, str(path)]
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        for process in running:
            process.wait(timeout=1200)
    finally:
        for process in running:
            process.kill()
    said = "".join((folder / f"out-{rank}.txt").read_text() for rank in range(processes))
    files = [folder / f"codes-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) if file.exists() else [] for file in files], said


def curve(folder: Path) -> list[dict[str, float]]:
    """Losses and gradient norms of every step of a run."""
    names = ("train/loss/", "train/task/", "train/cross/", "train/gradient_norm", "step")
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "train/loss/total" in r]
    return [{k: v for k, v in r.items() if k.startswith(names)} for r in records]


def disturb(trainer: Trainer, rank: int, step: int, how: str) -> None:
    """Make one process meet something at a step.

    ``SIGKILL`` and ``SIGTERM`` arrive before the step; ``save`` is a SIGKILL in the midst of writing its checkpoint;
    ``full`` a disk that fills up then.
    """
    if trainer.parallel.rank != rank:
        return
    if how in ("save", "full"):
        sharded = trainer.parallel.sharded
        owner, name = (FileSystemWriter, "write_data") if sharded else (checkpoint, "save_file")
        write = getattr(owner, name)

        def interrupted(*given):
            if trainer.progress.step != step:
                return write(*given)
            if how == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if sharded:
                write(*given)  # its shard is there, the index is not
            else:
                tensors, path = given
                write(dict(list(tensors.items())[: len(tensors) // 2]), path)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, interrupted)
        return
    real = trainer.step

    def stepped(micros):
        if trainer.progress.step == step:
            os.kill(os.getpid(), getattr(signal, how))
        return real(micros)

    trainer.step = stepped


def run(one: dict) -> int:
    """Train one run; 2 for an error that is explained, 1 for any other."""
    os.environ.setdefault("MASTER_PORT", str(one["port"]))
    try:
        trainer = Trainer(load_config(ROOT / "configs" / "tiny.yaml", one["overrides"]), Console(file=sys.stdout))
        if one.get("disturb"):
            disturb(trainer, **one["disturb"])
        trainer.train()
    except UniAlignmentError as error:
        print(f"error: {error}", flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    path = Path(sys.argv[1])
    if sys.argv[2:] == ["once"]:
        first = json.loads(path.read_text())[0]
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            first["disturb"] = None
        sys.exit(run(first))
    codes = []
    for one in json.loads(path.read_text()):
        child = os.fork()  # after the imports, before any thread
        if child == 0:
            code = run(one)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    path.with_name(f"codes-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
