"""The feature cache: what comes out is what went in, damage is noticed, and a run can't tell the difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unialignment.cli import main
from unialignment.errors import AssetError, ConfigError, StorageError
from unialignment.training import caching
from unialignment.training.batching import Batch
from unialignment.training.build import build_objective, build_tokenizer
from unialignment.training.caching import FeatureWorker, build_cache, make_plan
from unialignment.training.config import TransformerConfig, load_config
from unialignment.training.features import FeatureStore, ShardWriter, shard_done
from unialignment.training.samples import StepProducer, StepSource, fill_teacher_cache

META = {"version": 1, "identity": {}, "units": 2, "pool": 0, "tasks": []}
Make = Callable[..., TransformerConfig]


def quiet(_: str) -> None:
    pass


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A cache of two shards: ten latents of two shapes, prompts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        writer = ShardWriter()
        for row in range(5):
            shape = (4, 2, 3) if row % 2 else (4, 3, 2)
            writer.add("latent", f"{shard}/{row}", torch.randn(shape, generator=generator))
            writer.add("prompt", f"{shard}/{row}", torch.full((row + 1, 2), 10.0 * shard + row).half())
        writer.write(tmp_path, shard)
    (tmp_path / "meta.json").write_text(json.dumps(META))
    return tmp_path


def test_what_goes_in_comes_out(folder: Path) -> None:
    store = FeatureStore(folder)
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        for row in range(5):
            expected = torch.randn((4, 2, 3) if row % 2 else (4, 3, 2), generator=generator)
            assert torch.equal(store.get("latent", f"{shard}/{row}"), expected)
            prompt = store.get("prompt", f"{shard}/{row}")
            assert prompt.dtype == torch.float32 and torch.equal(prompt, torch.full((row + 1, 2), 10.0 * shard + row))
    assert store.count("latent") == 10 and store.width("prompt") == 2 and store.count("teacher_text") == 0
    assert store.has("latent", "0/4") and not store.has("latent", "0/5") and not store.has("nothing", "0/4")
    with pytest.raises(AssetError, match="has no latent for"):
        store.get("latent", "2/0")


def test_damage_is_noticed_and_says_how_to_mend_it(folder: Path) -> None:
    path = folder / "shards" / "000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    store = FeatureStore(folder)
    assert store.get("latent", "0/0") is not None
    with pytest.raises(AssetError, match="checksum differs.*makes only this shard"):
        for row in range(5):
            store.get("latent", f"1/{row}")
    path.write_bytes(bytes(data[:-1]))
    with pytest.raises(AssetError, match="lacks 1 of its 2 shards"):
        FeatureStore(folder)
    path.with_suffix(".json").write_text('{"bytes": 3')
    assert not shard_done(folder, 1)
    (folder / "meta.json").write_text("{")
    with pytest.raises(AssetError, match="is damaged"):
        FeatureStore(folder)
    with pytest.raises(AssetError, match="no feature cache at"):
        FeatureStore(folder / "elsewhere")


def test_a_shard_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    writer = ShardWriter()
    writer.add("latent", "a", torch.zeros(1 << 18))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(StorageError, match="disk is full or a size limit"):
            writer.write(tmp_path, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "shards").iterdir()) and not shard_done(tmp_path, 0)
    writer.write(tmp_path, 0)
    assert shard_done(tmp_path, 0)


def test_values_that_do_not_fit_the_type_are_refused() -> None:
    with pytest.raises(AssetError, match="not finite"):
        ShardWriter().add("latent", "a", torch.tensor([1e6]).half())


# ------------------------------------------------------------------------------------------------------- own data


class Stub:
    """A teacher that can be predicted."""

    image_dim, text_dim, fingerprint = 6, 5, "stub"
    calls = 0

    def embed_images(self, images: Any) -> torch.Tensor:
        Stub.calls += 1
        return torch.stack([torch.full((6,), float(np.asarray(i).mean())) for i in images]) / 255

    def embed_texts(self, texts: Any) -> torch.Tensor:
        return torch.stack([torch.full((5,), len(text) / 100) for text in texts])


@pytest.fixture()
def own(repo_root: Path, tmp_path: Path, tiny_pipeline, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configurations over the example data sets, with a small convolutional autoencoder and a stub teacher."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr("unialignment.alignment.teachers.load_teacher", lambda *_: Stub())
    monkeypatch.setattr(caching, "_teacher_hash", lambda name: f"hash of {name}")
    tiny_pipeline.autoencoder.save_pretrained(tmp_path / "autoencoder")
    examples = repo_root / "examples" / "data"
    sources = [f"{{path: '{path}'}}" for path in sorted(examples.glob("*/manifest.jsonl"))]

    def make(*overrides: str, own_sources: list[str] = sources) -> TransformerConfig:
        return load_config(
            examples / "train.yaml",
            [
                f"run.dir={tmp_path / 'run'}",
                f"autoencoder.path={tmp_path / 'autoencoder'}",
                f"data.sources=[{', '.join(own_sources)}]",
                "data.workers=0",
                *overrides,
            ],
        )

    return make


def batches_of(config: TransformerConfig, steps: int) -> list[list[Batch]]:
    teacher = config.run.folder / "teacher" if config.teacher.name else None
    if teacher is not None:
        fill_teacher_cache(config, teacher, quiet)
    build_tokenizer(config, config.run.folder / "tokenizer")
    producer = StepProducer(StepSource(config, config.run.folder / "tokenizer", teacher))
    return [producer(index)[0] for index in range(steps)]


def losses(config: TransformerConfig, all_batches: list[list[Batch]]) -> list[float]:
    tokenizer = build_tokenizer(config, config.run.folder / "tokenizer")
    torch.manual_seed(0)
    dims = (6, 5) if config.teacher.name else (0, 0)
    objective = build_objective(config, tokenizer, config.data.resolution, dims, quiet)
    for parameter in objective.transformer.parameters():  # zero gates would hide the conditions
        if not parameter.abs().any():
            torch.nn.init.normal_(parameter, std=0.1)
    noise = torch.Generator().manual_seed(1)
    return [float(objective(batches, noise).loss.detach()) for batches in all_batches]


def test_training_from_the_cache_gives_the_same_losses(own: Make, tmp_path: Path) -> None:
    options = ("teacher.name=stub", "data.buckets=true", "data.bucket_step=8")
    plain = own(*options)
    store = build_cache(make_plan(plain, tmp_path / "features", 0, 4, batch_size=3), report=quiet)
    assert 0 < store.count("teacher_image") == store.count("teacher_text") < store.count("latent")  # pairs only
    Stub.calls = 0
    cached = own(*options, f"data.cache={tmp_path / 'features'}", f"run.dir={tmp_path / 'cached'}")
    ours = batches_of(cached, 3)
    assert Stub.calls == 0
    assert all(batch.encoded and batch.image_teacher is not None for batch in ours[0] if batch.tasks[0] == "generate")
    theirs = batches_of(plain, 3)
    assert [[b.tasks for b in step] for step in ours] == [[b.tasks for b in step] for step in theirs]
    assert losses(cached, ours) == pytest.approx(losses(plain, theirs), rel=1e-5)
    # A latent in another's place would show.
    swapped = [[_rolled(batch) for batch in step] for step in ours]
    assert losses(cached, swapped) != pytest.approx(losses(plain, theirs), rel=1e-4)


def _rolled(batch: Batch) -> Batch:
    from dataclasses import replace

    return replace(batch, sources=tuple(s.roll(1, 0) for s in batch.sources))


def test_rows_that_were_unusable_are_replaced_alike(own: Make, tmp_path: Path, repo_root: Path) -> None:
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(repo_root / "examples" / "data" / "text-image", copy)
    for name in ("red-circle", "blue-square"):
        path = copy / "images" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:-30])
    options = (
        "mixture={generate: 4, edit: 0, perceive: 0, compose: 0, caption: 4, answer: 0}",
        "data.max_bad=0.5",
        "data.held_out=0",
    )
    sources = [f"{{path: '{copy / 'manifest.jsonl'}'}}"]
    plain = own(*options, own_sources=sources)
    build_cache(make_plan(plain, tmp_path / "features", 0, 5), report=quiet)
    assert (tmp_path / "features" / "quarantine.jsonl").read_text().count("\n") == 2
    cached = own(*options, f"data.cache={tmp_path / 'features'}", own_sources=sources)
    ours, theirs = batches_of(cached, 6), batches_of(plain, 6)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a.prompt_ids, b.prompt_ids) and torch.equal(a.pair_ids, b.pair_ids)
    assert losses(cached, ours) == pytest.approx(losses(plain, theirs), rel=1e-5)


def test_an_interrupted_cache_goes_on_where_it_stopped(own: Make, tmp_path: Path, monkeypatch) -> None:
    plan = make_plan(own(), tmp_path / "features", 0, 4)
    real, made = FeatureWorker.__call__, []

    def stop(self: FeatureWorker, number: int) -> int:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(number)
        return real(self, number)

    monkeypatch.setattr(FeatureWorker, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        build_cache(plan, report=quiet)
    with pytest.raises(AssetError, match="lacks"):
        FeatureStore(plan.folder)
    made.clear()
    monkeypatch.setattr(FeatureWorker, "__call__", lambda self, number: made.append(number) or real(self, number))
    kept = {path: path.stat().st_mtime_ns for path in (plan.folder / "shards").iterdir()}
    said: list[str] = []
    build_cache(plan, report=said.append)
    assert made == list(range(3, len(plan.units))) and "3 of" in said[0]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole = {path.name: path.read_bytes() for path in (plan.folder / "shards").glob("*.safetensors")}
    (plan.folder / "shards" / "000001.safetensors").unlink()
    made.clear()
    build_cache(plan, report=quiet)
    assert made == [1]
    assert whole == {path.name: path.read_bytes() for path in (plan.folder / "shards").glob("*.safetensors")}


def test_a_stale_cache_is_refused(own: Make, tmp_path: Path) -> None:
    cache = tmp_path / "features"
    build_cache(make_plan(own(), cache, 0, 64), report=quiet)
    used = f"data.cache={cache}"
    batches_of(own(used), 1)
    for override, what in (
        ("data.resolution=16", "picture sizes"),
        ("data.held_out=0.3", "data"),
        ("autoencoder.path=null", "autoencoder"),
        ("teacher.name=stub", "without a teacher"),
    ):
        with pytest.raises((AssetError, ConfigError), match=what):
            batches_of(own(used, override, f"run.dir={tmp_path / 'other'}"), 1)
    with pytest.raises(AssetError, match="no samples for infill"):
        batches_of(own(used, "mixture.infill=1"), 1)
    weights = tmp_path / "autoencoder" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(AssetError, match="another autoencoder"):
        batches_of(own(used), 1)
    with pytest.raises(AssetError, match="another autoencoder"):
        build_cache(make_plan(own(), cache, 0, 64), report=quiet)


def test_the_command_makes_and_verifies(own: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from unialignment.training.config import to_yaml

    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(own(f"data.cache={tmp_path / 'features'}")))
    assert main(["cache", str(path), "--shard-size", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["features"] == {"latent": 45} and result["bytes"] > 1000
    assert main(["cache", str(path), "--verify"]) == 0
    shard = tmp_path / "features" / "shards" / "000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    assert main(["cache", str(path), "--verify"]) == 2
    assert "checksum differs" in capsys.readouterr().err
    assert main(["cache", str(path), "--processes", "0"]) == 2
    path.write_text(to_yaml(own()))
    assert main(["cache", str(path)]) == 2
    assert "--out FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_make_the_same_cache(own: Make, tmp_path: Path) -> None:
    one = build_cache(make_plan(own(), tmp_path / "one", 0, 8), report=quiet)
    two = build_cache(make_plan(own(), tmp_path / "two", 0, 8), processes=2, report=quiet)
    assert one.count("latent") == two.count("latent")
    for file in (tmp_path / "one" / "shards").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / "shards" / file.name).read_bytes()


@pytest.mark.slow
def test_ray_makes_the_same_cache(own: Make, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    one = build_cache(make_plan(own(), tmp_path / "one", 0, 16), report=quiet)
    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
        two = build_cache(make_plan(own(), tmp_path / "two", 0, 16), ray_address="local", report=quiet)
    finally:
        ray.shutdown()
    assert one.count("latent") == two.count("latent")
    for file in (tmp_path / "one" / "shards").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / "shards" / file.name).read_bytes()


def test_pictures_that_change_at_every_showing_cannot_be_cached(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"world\.jitter"):
        tiny("world.jitter=1", f"data.cache={tmp_path}")
    with pytest.raises(ConfigError, match=r"world\.jitter.*teacher"):
        tiny("world.jitter=1", "teacher.name=package")
    with pytest.raises(ConfigError, match="set it to 0"):
        build_cache(make_plan(tiny("world.jitter=1"), tmp_path / "features", 4, 2), report=quiet)


def test_without_ray_the_remedy_is_said(own: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"unialignment\[ray\]"):
        build_cache(make_plan(own(), tmp_path / "features", 0, 64), ray_address="auto", report=quiet)


# ---------------------------------------------------------------------------------------------------------- world


def test_scenes_of_the_world_are_cached_with_what_they_say(
    tiny_pipeline, repo_root: Path, tmp_path: Path, nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unialignment.alignment.teachers.load_teacher", lambda *_: Stub())
    monkeypatch.setattr(caching, "_teacher_hash", lambda name: f"hash of {name}")
    tiny_pipeline.autoencoder.save_pretrained(tmp_path / "autoencoder")
    options = [
        f"run.dir={tmp_path / 'run'}",
        f"autoencoder.path={tmp_path / 'autoencoder'}",
        "text.corpus=1500",
        "teacher={name: stub, pool: 5}",
        "mixture={generate: 2, edit: 1, perceive: 1, control: 1, compose: 1, caption: 2, answer: 1, infill: 1}",
    ]
    plain = load_config(repo_root / "configs" / "tiny.yaml", options)
    build_cache(make_plan(plain, tmp_path / "features", 5, 3), report=quiet)
    cached = load_config(repo_root / "configs" / "tiny.yaml", [*options, f"data.cache={tmp_path / 'features'}"])
    ours, theirs = batches_of(cached, 3), batches_of(plain, 3)
    assert [[b.tasks for b in step] for step in ours] == [[b.tasks for b in step] for step in theirs]

    def measured(config: TransformerConfig, batches: list[list[Batch]]) -> list[float]:
        return losses(config.model_copy(update={"data": config.data.model_copy(update={"resolution": 64})}), batches)

    assert measured(cached, ours) == pytest.approx(measured(plain, theirs), rel=1e-5)
