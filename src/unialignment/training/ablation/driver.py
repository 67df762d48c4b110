"""Runs everything that an ablation still lacks, one after another or a few at once, each in a process of its own.

Stopping (Ctrl-C, SIGTERM) asks the runs to save; the same command then goes on. Knows nothing of what a run does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import yaml

from unialignment.errors import ConfigError, UniAlignmentError
from unialignment.evaluation.records import run_lock
from unialignment.storage import write_text
from unialignment.training.ablation.config import AblationConfig, Run, plan
from unialignment.training.ablation.worker import STOPPED, execute, finished
from unialignment.training.runtime import StopRequest

Say = Callable[[str], None]


def run_all(config: AblationConfig, say: Say = print, in_process: bool = False) -> bool:
    """Run whatever is not finished.

    Args:
        config: The ablation.
        say: Receives a line when a run starts or ends.
        in_process: Run in this process, one after another, instead of in processes of their own.

    Returns:
        Whether everything is finished; ``False`` if a signal stopped it.

    Raises:
        ConfigError: a task to be measured doesn't exist.
        UniAlignmentError: a run failed; the others' results are kept.
        StorageError: another process runs this ablation.
    """
    from unialignment.evaluation.world import PARTS

    if unknown := [name for name in config.measure.tasks if name not in PARTS]:
        raise ConfigError(f"measure.tasks: unknown {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    runs = list(plan(config))
    with run_lock(config.dir):
        resolved = config.dir / "ablation.yaml"
        write_text(resolved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        todo = [run for run in runs if finished(run, config.measure) is None]
        say(f"{config.name}: {len(runs) - len(todo)} of {len(runs)} runs finished, in {config.dir}")
        if not todo:
            return True
        filled: set[Path] = set()
        if in_process:
            for run in todo:
                prepare(config, run, filled, say)
                say(f"{run.name}: starts")
                if execute(config, run) is None:
                    return False
                say(f"{run.name}: finished")
            return True
        return _processes(config, resolved, todo, filled, say)


def prepare(config: AblationConfig, run: Run, filled: set[Path], say: Say) -> None:
    """What a run shares with others that must not write it at the same time: tokenizer, teacher's embeddings of a seed.

    Args:
        config: The ablation.
        run: The run that is about to start.
        filled: Caches that are complete; added to.
        say: Receives remarks.
    """
    from unialignment.training.build import build_tokenizer
    from unialignment.training.samples import fill_teacher_cache

    shared = config.dir / "tokenizer"
    if run.config.text.tokenizer == shared and not (shared / "tokenizer.json").is_file():
        text = run.config.text.model_copy(update={"tokenizer": None})
        build_tokenizer(run.config.model_copy(update={"text": text}), shared)
    folder = run.config.teacher.cache
    if run.config.teacher.name is not None and folder is not None and folder not in filled:
        fill_teacher_cache(run.config, folder, say)
        filled.add(folder)


def _processes(config: AblationConfig, resolved: Path, todo: list[Run], filled: set[Path], say: Say) -> bool:
    environment = {**os.environ}
    if config.jobs > 1:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    waiting = list(todo)
    running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    failures: list[str] = []
    stopped = False
    with StopRequest().watching() as stop, ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < config.jobs and not stop.requested and not failures:
                run = waiting.pop(0)
                prepare(config, run, filled, say)
                run.folder.mkdir(parents=True, exist_ok=True)
                output: IO[bytes] = stack.enter_context((run.folder / "output.log").open("ab"))
                command = [sys.executable, "-m", "unialignment.training.ablation.worker"]
                process = subprocess.Popen(
                    [*command, str(resolved), run.arm, str(run.seed)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the runs once, from here
                )
                running[process] = (run, time.monotonic())
                say(
                    f"{run.name}: starts ({len(todo) - len(waiting)} of {len(todo)}), output in {run.folder}/output.log"
                )
            if not running:
                break
            if stop.requested and not stopped:
                stopped = True
                say(f"{stop.requested}: asking {len(running)} runs to save and stop")
                for process in running:
                    process.send_signal(signal.SIGTERM)
            for process in [one for one in running if one.poll() is not None]:
                run, began = running.pop(process)
                if process.returncode == 0:
                    say(f"{run.name}: finished after {time.monotonic() - began:.0f} s")
                elif process.returncode == STOPPED or stopped:
                    stopped = True
                    say(f"{run.name}: stopped and saved")
                else:
                    failures.append(f"{run.name} (exit code {process.returncode}): {_last_line(run)}")
            if running:
                time.sleep(0.2)
    if failures:
        raise UniAlignmentError(
            f"{len(failures)} runs failed: {'; '.join(failures)}. See output.log in their folders; the same command "
            "goes on."
        )
    return not stopped and not waiting


def _last_line(run: Run) -> str:
    lines = (run.folder / "output.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
