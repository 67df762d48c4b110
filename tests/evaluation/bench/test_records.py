"""Records survive kills; runs that differ are never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from unialignment.errors import InputError, StorageError
from unialignment.evaluation.records import RecordLog, claim, run_lock


def test_a_line_cut_off_by_a_kill_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = RecordLog(path, ("id",))
    for index in range(3):
        log.append({"id": index})
    whole = path.read_bytes()
    for cut in range(1, 10):
        path.write_bytes(whole[:-cut])
        again = RecordLog(path, ("id",))
        assert [record["id"] for record in again] == [0, 1]
        again.append({"id": 2})
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id"\n{"id": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        RecordLog(path, ("id",))


def test_identities_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    first = {"model": {"name": "a"}, "versions": {"torch": "1"}}
    claim(path, first)
    claim(path, first)
    with pytest.raises(InputError, match=r"model\.name: 'a' there, 'b' here"):
        claim(path, {**first, "model": {"name": "b"}}, accept_versions=True)
    other = {**first, "versions": {"torch": "2"}}
    with pytest.raises(InputError, match="--accept-versions"):
        claim(path, other)
    claim(path, other, accept_versions=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(StorageError, match="in use"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass
