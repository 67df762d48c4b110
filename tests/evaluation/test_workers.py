"""An evaluation in two processes gives what one process gives."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unialignment.errors import InputError
from unialignment.evaluation.cli import _contest, _world
from unialignment.evaluation.workers import run_parts
from unialignment.evaluation.world import Settings, combine


@pytest.mark.slow
def test_two_processes_give_what_one_gives(pack, nano, repo_root: Path) -> None:
    if len(nano.styles) < 2:
        pytest.skip("held-out edits need two styles: the artwork of `unialign world build --source npm`")
    settings = Settings(limit=2, seed=4, pool=4)
    build = functools.partial(_contest, "nano", "cpu", "nano", "held_out", 4)
    names = ["caption", "answer", "retrieval"]
    _, stream = _world("nano", "held_out", 4)
    one, two = (combine(list(run_parts(build, names, settings, n)), stream, settings) for n in (1, 2))
    assert one.metrics == two.metrics
    assert (one.by_kind, one.ceilings, one.floors) == (two.by_kind, two.ceilings, two.floors)
    assert list(one.seconds) == names


def _no_model():
    raise InputError("no model of that name")


def test_what_is_wrong_with_a_model_is_said_by_any_number_of_processes() -> None:
    for workers in (1, 2):
        with pytest.raises(InputError, match="no model of that name"):
            list(run_parts(_no_model, ["caption", "answer"], Settings(limit=1), workers))


_PARENT = """
import functools, sys, time
from pathlib import Path
from unialignment.evaluation.workers import run_parts

def build():
    return (None, None, None)

def wait(pipe, stream, judge, name, settings, folder):
    import os
    Path(folder, name).write_text(str(os.getpid()))
    time.sleep(300)

if __name__ == "__main__":
    list(run_parts(build, ["caption", "answer"], None, 2, functools.partial(wait, folder=sys.argv[1])))
"""


@pytest.mark.slow
def test_killed_with_sigkill_it_leaves_no_process_behind(tmp_path: Path) -> None:
    script, folder = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(_PARENT)
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(folder)])
    deadline = time.monotonic() + 240
    while len(pids := [int(text) for path in folder.iterdir() if (text := path.read_text())]) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
