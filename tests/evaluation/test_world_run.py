"""A run of SemGen-World in a folder: cut off anywhere it goes on, and ends where an uninterrupted one does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.world import Settings, run_part
from unialignment.evaluation.world_run import RecordedModel, begin, read_part, run_recorded
from unialignment.world.stream import WorldStream


class Pipe:
    """Pictures that follow from seed and source; fails after some calls, as a killed process does."""

    def __init__(self, calls: int = 1000) -> None:
        self.calls, self.seeds = calls, []

    def run(self, task, prompts, images, *, kind, seed, **options):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.seeds += seed
        made = []
        for row, one in enumerate(seed):
            grey = 0 if images is None else int(np.asarray(images[row][0]).mean())
            made.append(Image.new("RGB", (64, 64), (one % 256, grey, 7)))
        return SimpleNamespace(images=made)


@pytest.fixture(scope="module")
def stream(pack, nano) -> WorldStream:
    if len(nano.styles) < 2:
        pytest.skip("held-out edits need two styles: the artwork of `unialign world build --source npm`")
    return WorldStream(pack, nano, "held_out", 3)


@pytest.fixture(scope="module")
def judge(pack, nano) -> Judge:
    return Judge(pack, nano)


SETTINGS = Settings(limit=5, seed=9, batch_size=2, references=False)


@pytest.mark.parametrize("name", ["generate", "compose", "turns"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_cut_off_and_resumed(stream: WorldStream, judge: Judge, tmp_path: Path, name: str, calls: int) -> None:
    whole = run_part(Pipe(), stream, judge, name, SETTINGS)
    broken = Pipe(calls)
    with pytest.raises(KeyboardInterrupt):
        run_recorded(broken, stream, judge, name, SETTINGS, folder=tmp_path)
    log = tmp_path / "parts" / name / "outputs.jsonl"
    if log.exists():  # killed in the middle of a line
        log.write_text(log.read_text() + '{"turn": 0, "it')
    again = Pipe()
    part = run_recorded(again, stream, judge, name, SETTINGS, folder=tmp_path)
    assert part is not None and (part.metrics, part.scores) == (whole.metrics, whole.scores)
    assert len(broken.seeds) + len(again.seeds) == 5 * (3 if name == "turns" else 1)
    assert not set(broken.seeds) & set(again.seeds)
    assert read_part(tmp_path, name) == run_recorded(Pipe(0), stream, judge, name, SETTINGS, folder=tmp_path) == part
    records = [json.loads(line) for line in log.with_name("judgements.jsonl").read_text().splitlines()]
    assert [record["scores"] for record in records] == list(part.scores)


def test_steps_one_by_one(stream: WorldStream, judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the generate step first"):
        run_recorded(Pipe(), stream, judge, "turns", SETTINGS, folder=tmp_path, steps=("judge",))
    assert run_recorded(Pipe(), stream, judge, "turns", SETTINGS, folder=tmp_path, steps=("generate",)) is None
    part = run_recorded(Pipe(0), stream, judge, "turns", SETTINGS, folder=tmp_path, steps=("judge",))
    assert part is not None and part.metrics == run_part(Pipe(), stream, judge, "turns", SETTINGS).metrics


def test_a_damaged_picture_is_made_again_and_long_prompts_are_noted(tmp_path: Path) -> None:
    def check(text: str) -> None:
        if len(text.split()) > 3:
            raise InputError("too long")

    target = np.zeros((64, 64, 3), np.uint8)
    samples = [Sample("generate", "a b c d e" if n == 1 else "a b", target_image=target) for n in range(3)]
    pipe = Pipe()
    pipe.check_length = check
    first = RecordedModel(pipe, 2, None, tmp_path)
    whole = first.outputs(samples, 0)
    assert first.shortened == 1 and json.loads(first.log.path.read_text().splitlines()[1])["read"] == "a b c"
    (tmp_path / "pictures" / "0-0001.png").write_bytes(b"")
    again = RecordedModel(pipe, 2, None, tmp_path)
    assert all((a == b).all() for a, b in zip(again.outputs(samples, 0), whole, strict=True))
    assert pipe.seeds == [0, 1, 2, 0, 1] and again.shortened == 1 and again.earlier > 0


def test_another_run_and_a_damaged_part_are_refused(stream: WorldStream, tmp_path: Path) -> None:
    begin(tmp_path, stream, {"fingerprint": "a"}, SETTINGS)
    begin(tmp_path, stream, {"fingerprint": "a"}, SETTINGS)
    with pytest.raises(InputError, match="model.fingerprint: 'a' there, 'b' here"):
        begin(tmp_path, stream, {"fingerprint": "b"}, SETTINGS)
    path = tmp_path / "parts" / "caption" / "part.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "caption"}')
    with pytest.raises(InputError, match="delete it"):
        read_part(tmp_path, "caption")
