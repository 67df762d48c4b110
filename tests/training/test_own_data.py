"""Runs on own data: without the sprite world, resumed exactly, through damage, refused where they lose meaning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unialignment.errors import AssetError, ConfigError
from unialignment.training.batching import Batch
from unialignment.training.build import build_tokenizer
from unialignment.training.config import TransformerConfig, load_config
from unialignment.training.data import Prefetcher
from unialignment.training.logging import read_metrics
from unialignment.training.loop import Trainer
from unialignment.training.samples import StepSource, validation_samples

Make = Callable[..., TransformerConfig]


@pytest.fixture()
def own(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configurations over the example data sets; whoever asks for the sprite world fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def no_world(*_: object) -> None:
        raise AssertionError("own data needs no sprite world")

    monkeypatch.setattr("unialignment.world.sprites.SpritePack.load", no_world)
    examples = repo_root / "examples" / "data"
    everything = [str(path) for path in sorted(examples.glob("*/manifest.jsonl"))]

    def make(*overrides: str, paths: list[str] = everything) -> TransformerConfig:
        sources = json.dumps([{"path": path} for path in paths])
        return load_config(
            examples / "train.yaml",
            [
                f"run.dir={tmp_path / 'run'}",
                f"data.sources={sources}",
                "data.workers=0",
                "text.corpus=100",
                "logging.tensorboard=false",
                "logging.samples=false",
                "logging.log_every=1",
                "run.max_steps=4",
                *overrides,
            ],
        )

    return make


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss/total"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss/total" in r}


def test_a_run_needs_no_world_and_resumes_in_the_middle_of_an_epoch(own: Make, tmp_path: Path, silent) -> None:
    steady = "optimizer.schedule=constant"
    Trainer(own(steady, f"run.dir={tmp_path / 'whole'}"), silent).train()
    Trainer(own(steady, "run.max_steps=2"), silent).train()
    resumed = Trainer(own(steady), silent)
    folder = resumed.train()
    assert resumed.resumed_at == 2
    assert [losses(tmp_path / "run")[step] for step in (3, 4)] == [losses(tmp_path / "whole")[step] for step in (3, 4)]
    import unialignment

    pipeline = unialignment.load(folder, device="cpu")
    assert pipeline.generate("a red circle", num_inference_steps=1).images[0].size == (32, 32)
    with pytest.raises(ConfigError, match=r"another data\.resolution"):
        Trainer(own("data.resolution=24"), silent).resume()
    assert Trainer(own("data.prefetch=2", "data.max_bad=0.5"), silent).resume()


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(
        a.tasks == b.tasks
        and torch.equal(a.prompt_ids, b.prompt_ids)
        and torch.equal(a.pair_ids, b.pair_ids)
        and all(torch.equal(x, y) for x, y in zip(a.sources, b.sources, strict=True))
        and (a.target_images is None or torch.equal(a.target_images, b.target_images))
        for a, b in zip(ours, theirs, strict=True)
    )


def test_what_a_step_sees_does_not_depend_on_workers(own: Make) -> None:
    config = own("data.buckets=true", "data.bucket_step=8")
    build_tokenizer(config, config.run.folder / "tokenizer")
    source = StepSource(config, config.run.folder / "tokenizer")
    produce = source()
    expected = [produce(index)[0] for index in range(3, 7)]
    assert len({batch.target_images.shape for step in expected for batch in step if batch.tasks[0] == "generate"}) > 1
    with Prefetcher(source, 3, workers=2, depth=2) as loader:
        found = [next(loader)[0] for _ in range(4)]
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not equal(expected[0], expected[1])


def damaged_copy(repo_root: Path, folder: Path, names: tuple[str, ...]) -> str:
    shutil.copytree(repo_root / "examples" / "data" / "text-image", folder)
    for name in names:
        path = folder / "images" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:-30])
    return str(folder / "manifest.jsonl")


ONLY_PAIRS = "mixture={generate: 4, edit: 0, perceive: 0, compose: 0, caption: 4, answer: 0}"


def test_a_run_survives_some_damage_and_says_so(own: Make, repo_root: Path, tmp_path: Path, silent) -> None:
    path = damaged_copy(repo_root, tmp_path / "damaged", ("red-circle",))
    config = own(ONLY_PAIRS, "data.max_bad=0.2", "run.max_steps=6", paths=[path])
    Trainer(config, silent).train()
    listed = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in listed] == ["manifest.jsonl:1"]
    assert "damaged" in json.loads(listed[0])["reason"]
    assert "(unusable row)" in (tmp_path / "run" / "summary.md").read_text()
    excluded = own(ONLY_PAIRS, f"data.exclude={tmp_path / 'run' / 'quarantine.jsonl'}", f"run.dir={tmp_path / 'new'}",
                   paths=[path])  # fmt: skip
    Trainer(excluded, silent).train()
    assert not (tmp_path / "new" / "quarantine.jsonl").exists()


def test_a_run_stops_where_everything_is_damaged(own: Make, repo_root: Path, tmp_path: Path, silent) -> None:
    names = ("red-circle", "green-circle", "blue-circle", "yellow-circle", "red-square")
    path = damaged_copy(repo_root, tmp_path / "damaged", names)
    config = own(ONLY_PAIRS, "run.max_steps=200", "data.held_out=0.01", "data.max_bad=0.3", paths=[path])
    build_tokenizer(config, config.run.folder / "tokenizer")
    produce = StepSource(config, config.run.folder / "tokenizer")()
    with pytest.raises(
        AssetError, match=r"more than data\.max_bad=0\.3 allows; they are listed in .*quarantine\.jsonl"
    ):
        for index in range(200):
            produce(index)


def test_validation_uses_rows_that_training_never_sees(own: Make, repo_root: Path) -> None:
    config = own()
    tokenizer = build_tokenizer(config, config.run.folder / "tokenizer")
    held = {sample.prompt for sample in validation_samples(config, tokenizer)["generate"]}
    produce = StepSource(config, config.run.folder / "tokenizer")()
    seen = {produce.stream.sample("generate", number).prompt for number in range(60)}
    assert held and not held & seen and len(held | seen) == 12
    named = own(f"data.validation=[{{path: '{repo_root / 'examples/data/text-image/manifest.jsonl'}'}}]", ONLY_PAIRS,
                "data.held_out=0")  # fmt: skip
    assert len(validation_samples(named, tokenizer)["generate"]) == 4
    with pytest.raises(AssetError, match=r"data\.held_out above 0"):
        validation_samples(own("data.held_out=0"), tokenizer)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.sources=[{}]", "name a file"),
        ("data.sources=[{path: a, tasks: [painting]}]", "unknown task 'painting'"),
        ("data.sources=[{pth: a}]", "unknown key"),
        ("data.sources=[{format: world, path: a}]", "takes neither path"),
        ("data.bucket_step=7 data.buckets=true", "multiple of bucket_step"),
        ("data.validation=[{format: world}]", "takes own data"),
        ("data.sources=[{path: a, weight: 0}]", "greater than 0"),
    ],
)
def test_mistakes_in_the_configuration_are_explained(own: Make, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own(*(override.split(" data.")[0:1] + [f"data.{part}" for part in override.split(" data.")[1:]]))
