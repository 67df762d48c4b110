"""Own data shared out over processes and workers, and damaged by exactly a twentieth.

However many processes and workers there are, and whatever their number was before a restart: every row once an epoch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from unialignment.errors import AssetError
from unialignment.training.batching import Batch
from unialignment.training.build import build_tokenizer
from unialignment.training.config import TransformerConfig, load_config
from unialignment.training.loop import Trainer
from unialignment.training.samples import StepProducer, StepSource
from unialignment.training.sharing import Layout, Share, SharedSource

Make = Callable[..., TransformerConfig]
Row = tuple[int, ...]
"""A row by its caption's tokens; no two have the same."""
PAIRS = "mixture={generate: 4, edit: 0, perceive: 0, compose: 0, caption: 0, answer: 0}"
WORDS = ("large", "small", "old", "new", "near", "far", "light", "dark", "soft", "hard")


def manifest(repo_root: Path, folder: Path, rows: int) -> Path:
    """``rows`` rows, each with a caption and a picture file of its own."""
    picture = (repo_root / "examples/data/text-image/images/red-circle.png").read_bytes()
    folder.mkdir(parents=True)
    lines = []
    for row in range(rows):
        (folder / f"{row}.png").write_bytes(picture)
        lines.append(json.dumps({"image": f"{row}.png", "caption": f"a {WORDS[row // 10]} {WORDS[row % 10]} circle"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


@pytest.fixture()
def own(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(path: Path, *overrides: str) -> TransformerConfig:
        config = load_config(
            repo_root / "examples" / "data" / "train.yaml",
            [
                f"run.dir={tmp_path / 'run'}",
                f"data.sources=[{{path: '{path}'}}]",
                "data={resolution: 16, held_out: 0, workers: 0}",
                "text.corpus=100",
                "prompt_dropout=0",
                "logging.tensorboard=false",
                "logging.samples=false",
                PAIRS,
                *overrides,
            ],
        )
        build_tokenizer(config, config.run.folder / "tokenizer")
        return config

    return make


def rows(batch: Batch) -> list[Row]:
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]


def rows_seen(
    config: TransformerConfig, processes: int, workers: int, steps: range, in_step: bool = False
) -> dict[int, list[Row]]:
    """The rows that all processes and their workers together see in each of some steps."""
    source = StepSource(config, config.run.folder / "tokenizer")
    seen: dict[int, list[Row]] = {step: [] for step in steps}
    for rank in range(processes):
        layout = Layout(config.micro_batches, processes, rank, in_step)
        for worker in range(workers):
            produce = SharedSource(source, layout)()
            first = steps.start * layout.local + worker  # as Prefetcher deals positions to workers
            for index in range(first, steps.stop * layout.local, workers):
                for share in produce(index)[0]:
                    assert isinstance(share, Share)
                    valid = share.valid.tolist()
                    seen[index // layout.local] += [row for row, real in zip(rows(share.batch), valid) if real]
    return seen


def sets(seen: dict[int, list[Row]]) -> dict[int, list[Row]]:
    return {step: sorted(found) for step, found in seen.items()}


EPOCH = 3
"""Steps of an epoch: 24 rows, two micro-batches of four rows a step."""


@pytest.mark.parametrize(
    ("processes", "workers", "in_step"), [(2, 1, False), (2, 2, False), (4, 3, False), (3, 2, False), (2, 2, True)]
)
def test_every_row_once_an_epoch_over_processes_and_workers(
    own: Make, repo_root: Path, tmp_path: Path, processes: int, workers: int, in_step: bool
) -> None:
    config = own(manifest(repo_root, tmp_path / "data", 24), "micro_batches=2")
    alone = rows_seen(config, 1, 1, range(2 * EPOCH))
    together = rows_seen(config, processes, workers, range(2 * EPOCH), in_step)
    assert sets(together) == sets(alone)
    for epoch in (0, 1):
        counts = Counter(row for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for row in together[step])
        assert len(counts) == 24 and set(counts.values()) == {1}
    assert alone[0] != alone[EPOCH]  # the second epoch has another order


@pytest.mark.parametrize(("before", "after"), [((1, 1), (4, 3)), ((4, 1), (2, 2)), ((3, 2), (1, 1))])
def test_an_epoch_that_was_begun_by_others_is_finished_without_gap_or_repetition(
    own: Make, repo_root: Path, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    config = own(manifest(repo_root, tmp_path / "data", 24), "micro_batches=2")
    seen = rows_seen(config, *before, range(0, 1)) | rows_seen(config, *after, range(1, EPOCH))
    counts = Counter(row for found in seen.values() for row in found)
    assert len(counts) == 24 and set(counts.values()) == {1}


def test_streamed_shards_are_dealt_alike_however_many_read_them(own: Make, tmp_path: Path, repo_root: Path) -> None:
    pytest.importorskip("datasets")
    path = manifest(repo_root, tmp_path / "data", 24)
    lines = path.read_text().splitlines()
    for shard in range(3):
        part = "\n".join(lines[8 * shard : 8 * shard + 8]) + "\n"
        (path.parent / f"shard-{shard}.jsonl").write_text(part)
    source = f"data.sources=[{{path: '{path.parent}/shard-*.jsonl', streaming: true}}]"
    config = own(path, source, "data.shuffle_block=4", "micro_batches=2")
    alone = rows_seen(config, 1, 1, range(2 * EPOCH))
    counts = Counter(row for found in alone.values() for row in found)
    assert len(counts) == 24 and max(counts.values()) <= 3
    assert sets(rows_seen(config, 2, 2, range(2 * EPOCH))) == sets(alone)
    resumed = rows_seen(config, 1, 1, range(0, 2)) | rows_seen(config, 4, 1, range(2, 2 * EPOCH))
    assert sets(resumed) == sets(alone)


def corrupt(path: Path, rows: dict[int, str]) -> None:
    """Damage pictures: cut short, replaced by something else, gone."""
    for row, how in rows.items():
        picture = path.parent / f"{row}.png"
        if how == "gone":
            picture.unlink()
        else:
            picture.write_bytes(picture.read_bytes()[:-30] if how == "short" else b"no picture" * 20)


def test_a_twentieth_of_corrupt_pictures_costs_a_run_nothing_else(
    own: Make, repo_root: Path, tmp_path: Path, silent
) -> None:
    path = manifest(repo_root, tmp_path / "data", 60)
    whole = rows_seen(own(path), 1, 1, range(60))  # four epochs of 15 micro-batches
    bad = {3: "short", 20: "other", 41: "gone"}
    corrupt(path, bad)
    config = own(path)
    produce = StepProducer(StepSource(config, config.run.folder / "tokenizer"))
    counted, used = 0, Counter[Row]()
    for index in range(60):
        batches, replaced = produce(index)
        counted += sum(replaced.values())
        (batch,) = batches
        # Only the damaged rows' places are taken by others, which are no pairs.
        substitutes = (batch.pair_ids < 0).tolist()
        for mine, other, substitute in zip(rows(batch), whole[index], substitutes, strict=True):
            assert (mine == other) != substitute
            used[other if not substitute else ()] += 1
    quarantine = produce.stream.quarantine
    assert quarantine.read >= 240 and quarantine.refused == counted >= 12  # each of the three in each of four epochs
    assert used[()] == 12 and sorted(used.values()) == [4] * 57 + [12]
    listed = [json.loads(line) for line in (config.run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(entry["row"] for entry in listed) == sorted(f"manifest.jsonl:{row + 1}" for row in bad)
    assert len({entry["reason"] for entry in listed}) == 3

    strict = own(path, "data.max_bad=0.04", f"run.dir={tmp_path / 'strict'}")
    produce = StepProducer(StepSource(strict, strict.run.folder / "tokenizer"))
    with pytest.raises(AssetError, match=r"more than data\.max_bad=0\.04 allows; they are listed in"):
        for index in range(60):
            produce(index)

    held = [f"data.validation=[{{path: '{repo_root}/examples/data/text-image/manifest.jsonl'}}]", "run.max_steps=20"]
    Trainer(own(path, *held, "model.transformer={num_layers: 1}"), silent).train()
    assert "generate (unusable row)" in (tmp_path / "run" / "summary.md").read_text()
