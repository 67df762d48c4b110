"""Model folders into other model folders: between our layout and the published one, from Stable Diffusion 3's into ours
as a start for training, with a LoRA merged, and with the changes of several training runs added up.

Weights are streamed from file to file, so a model of any size needs next to no memory; tensors keep their type and
every bit, so there and back gives the same weights. What only the published layout has (scheduler, tokenizer files,
alignment projectors) travels along in a folder ``published/``. Every destination appears whole or not at all, with a
manifest of sizes and checksums. Knows nothing of what tensors compute.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unialignment import __version__
from unialignment.errors import CheckpointError, InputError, StorageError
from unialignment.model.checkpoints import check_names_and_shapes, name_list, read_json
from unialignment.model.folders import CHECKSUMS_NAME, INDEX_NAME, verify_checksums
from unialignment.model.initialise import initial_entries, sd3_tokenizer
from unialignment.model.layouts import folder_layout
from unialignment.model.lora import LoraPair, LoraReport, read_lora
from unialignment.model.published import (
    PROMPT_LENGTH,
    PUBLISHED_CLASS,
    TRAINING_ONLY,
    check_text_encoder,
    check_transformer,
    check_vae,
    empty_transformer,
    load_mask_embedding,
    load_t5_tokenizer,
    sampling_settings,
    scheduler_shift,
    token_vector,
)
from unialignment.model.streaming import (
    Entry,
    FolderWriter,
    entry_tensor,
    need_space,
    parse_size,
    read_entries,
    replaced,
    tensor_entry,
)
from unialignment.model.tokenizer import TextTokenizer
from unialignment.storage import atomic_folder

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
DEFAULT_SHARD = "5GB"
LAYOUTS = ("unialignment", "published")
_OWN_CLASSES = {
    "transformer": "UniAlignmentTransformer",
    "text_embedder": "T5TextEmbedder",
    "autoencoder": "KLAutoencoder",
    "tokenizer": "TextTokenizer",
}
_PUBLISHED_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["modules.unialignment_model", PUBLISHED_CLASS],
    "vae": ["diffusers", "AutoencoderKL"],
}
_PUBLISHED_ARITHMETIC = {
    **{"attention_mode": "joint", "modulation": "block", "prediction": "velocity", "activation": "gelu"},
    **{"mlp_ratio": 4.0, "embedding_dim": 0, "aligned_source": False},
}
_KEPT = "published"
"""Subfolder of our layout for what only the published one has."""
_MASK_FILE = "mask_embedding.safetensors"
_MASK_KEY = "mask_embedding"


def convert(
    source: str | Path, destination: str | Path, to: str | None = None, max_shard_size: str | int = DEFAULT_SHARD
) -> Path:
    """Convert a model folder, or a folder with only a transformer, between our layout and the published one.

    A Stable Diffusion 3 or 3.5 folder becomes a start for training in our layout, the same that loading it gives. What
    is new in it is logged and in the manifest; there is no way back.

    Args:
        source: The folder; only read.
        destination: Folder to write; must not exist or be empty.
        to: ``"unialignment"`` or ``"published"``; the other one than the source's unless given.
        max_shard_size: Largest weight file, like ``"5GB"``.

    Returns:
        ``destination``.

    Raises:
        InputError: ``to`` is unknown or what the source is already.
        CheckpointError: The source is incomplete, damaged, or can't be said in the other layout.
        StorageError: It can't be written; nothing is left half-written.
    """
    source, destination, shard = Path(source), Path(destination), parse_size(max_shard_size)
    alone = not (source / INDEX_NAME).is_file() and (source / "config.json").is_file()
    layout = _component_layout(source) if alone else folder_layout(source)
    goals = [name for name in LAYOUTS if name != layout and (layout in LAYOUTS or name == "unialignment")]
    goal = to or goals[0]
    if goal not in goals:
        raise InputError(f"{source} is {layout!r}; it can be converted to {goals[0]!r} only")
    verify_checksums(source)
    with _writing(source, destination) as writer:
        if layout == "sd3":
            facts = _start_from_sd3(source, writer, shard)
            _manifest(writer, {"from": layout, "to": goal, "source": source.name, **facts})
            return destination
        if alone:
            count = _transformer_to_published(source, writer, "", shard, None) if goal == "published" else (
                _transformer_to_ours(source, writer, "", shard)
            )  # fmt: skip
        elif goal == "unialignment":
            count = _to_ours(source, writer, shard)
        else:
            count = _to_published(source, writer, shard)
        _manifest(writer, {"from": layout, "to": goal, "source": source.name, "tensors": count})
    return destination


def merge_folder(
    model: str | Path,
    lora: str | Path,
    destination: str | Path,
    scale: float = 1.0,
    max_shard_size: str | int = DEFAULT_SHARD,
) -> LoraReport:
    """Write a model folder with a LoRA added to its transformer's weights, in float32 arithmetic, tensor by tensor.

    Args:
        model: A folder of our layout or the published one; only read.
        lora: A LoRA file, or a folder with one.
        destination: Folder to write; must not exist or be empty.
        scale: Strength; 1 is as trained.
        max_shard_size: Largest weight file.

    Returns:
        What matched and what didn't.

    Raises:
        CheckpointError: Model or LoRA are unusable or don't fit each other.
        StorageError: It can't be written; nothing is left half-written.
    """
    model, shard = Path(model), parse_size(max_shard_size)
    layout = folder_layout(model)
    if layout not in LAYOUTS:
        raise CheckpointError(
            f"{model} has the layout of Stable Diffusion 3; make a model of it by `unialign convert`, then merge"
        )
    verify_checksums(model)
    settings = check_transformer(model / "transformer")
    pairs, report = read_lora(lora, empty_transformer(settings, model))
    entries = read_entries(model / "transformer")
    for layer, pair in pairs.items():
        name = f"{layer}.weight"
        entries[name] = replaced(entries[name], partial(_added, pair=pair, scale=scale))
    with _writing(model, Path(destination)) as writer:
        for file in sorted(model.rglob("*")):
            name = file.relative_to(model).as_posix()
            # A card, or an evaluation, of the unmerged weights would be wrong.
            inside = "/" in name or name == INDEX_NAME or file.suffix == ".pth"
            weights = name.startswith("transformer/") and "safetensors" in file.name
            if file.is_file() and inside and not weights:
                writer.copy(file, name)
        writer.tensors("transformer", "diffusion_pytorch_model", entries, shard)
        facts = {"lora": Path(lora).name, "scale": scale, "layers": len(pairs), "unmatched": dict(report.unmatched)}
        _manifest(
            writer, {"from": layout, "to": layout, "source": model.name, "tensors": len(entries), "merged": facts}
        )
    return report


def add_runs(
    model: str | Path,
    runs: Sequence[tuple[str | Path, float]],
    destination: str | Path,
    max_shard_size: str | int = DEFAULT_SHARD,
) -> dict[str, int]:
    """Write a model folder whose weights are ``model + Σ scale · (run - model)``, in float32, tensor by tensor.

    Task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023): what runs from one start learned
    each by itself, in one model. It is a start for a short run of all tasks rather than a finished model.

    Args:
        model: A folder of our layout, from which all runs were started; only read.
        runs: Model folders and the strengths of their changes; 1 is as trained.
        destination: Folder to write; must not exist or be empty.
        max_shard_size: Largest weight file.

    Returns:
        Number of tensors that any run has changed, by component.

    Raises:
        InputError: No runs.
        CheckpointError: A folder is unusable, or a run differs from the model in more than its transformer's and text
            embedder's weights: it wasn't started from it.
        StorageError: It can't be written; nothing is left half-written.
    """
    if not runs:
        raise InputError("no runs to add: name at least one model folder that was trained from this one")
    model, shard = Path(model), parse_size(max_shard_size)
    folders = [Path(folder) for folder, _ in runs]
    for folder in (model, *folders):
        if folder_layout(folder) != "unialignment":
            raise CheckpointError(f"{folder} isn't a model folder of our layout; `unialign convert` makes one of it")
        verify_checksums(folder)
    learned = any((model / "text_embedder").glob("diffusion_pytorch_model*"))  # a T5 isn't trained along
    parts = ["transformer", "text_embedder"] if learned else ["transformer"]
    summed, changed = {}, {}
    for part in parts:
        entries = read_entries(model / part)
        others = [read_entries(folder / part) for folder in folders]
        changed[part] = 0
        for name, entry in entries.items():
            steps = []
            for (run, scale), other in zip(runs, others, strict=True):
                if other.keys() != entries.keys() or other[name].shape != entry.shape:
                    raise CheckpointError(f"{run}: its {part} has other tensors than {model}: not trained from it")
                if not _equal(entry, other[name]):
                    steps.append((other[name], scale))
            if steps:
                entries[name] = replaced(entry, partial(_moved, steps=steps))
                changed[part] += 1
        summed[part] = entries
    for name, file in _kept(model, parts):
        if file.suffix == ".safetensors":
            _same_weights(file, [folder / name for folder in folders])
        elif name == "tokenizer/tokenizer.json":
            for folder in folders:
                if not (folder / name).exists() or (folder / name).read_bytes() != file.read_bytes():
                    raise CheckpointError(f"{folder} has other words than {model}: not trained from it")
    added = [{"model": str(run), "scale": scale} for run, scale in runs]
    copy_changed(model, Path(destination), summed, {}, shard, {"added": added})
    return changed


def copy_changed(
    model: Path,
    destination: Path,
    weights: Mapping[str, Mapping[str, Entry]],
    files: Mapping[str, Any],
    shard: int,
    facts: Mapping[str, Any],
) -> None:
    """Write a model folder of our layout with other weights, and without its card, which would be of the old ones.

    Args:
        model: Folder to take everything else from.
        destination: Folder to write; must not exist or be empty.
        weights: New tensors by component.
        files: JSON files with new contents, by name.
        shard: Bytes of the largest weight file.
        facts: For the manifest.

    Raises:
        StorageError: It can't be written; nothing is left half-written.
    """
    with _writing(model, destination) as writer:
        for name, file in _kept(model, weights):
            if name not in files:
                writer.copy(file, name)
        for name, data in files.items():
            writer.json(name, data)
        for part, entries in weights.items():
            writer.tensors(part, "diffusion_pytorch_model", entries, shard)
        _manifest(writer, {"from": "unialignment", "to": "unialignment", "source": model.name, **facts})


def _kept(model: Path, changed: Iterable[str]) -> list[tuple[str, Path]]:
    """Files of a model folder but its card and the weights of changed components: name in the folder, and path."""
    parts, kept = set(changed), []
    for file in sorted(model.rglob("*")):
        name = file.relative_to(model).as_posix()
        inside = "/" in name or name == INDEX_NAME
        if file.is_file() and inside and not (name.split("/")[0] in parts and "safetensors" in file.name):
            kept.append((name, file))
    return kept


def _equal(one: Entry, other: Entry) -> bool:
    """Whether the values are the same; a bundled model has them in fewer bits than a run that started from it."""
    if one.dtype == other.dtype:
        return b"".join(one.read()) == b"".join(other.read())
    return one.shape == other.shape and torch.equal(entry_tensor(one).float(), entry_tensor(other).float())


def _moved(weight: torch.Tensor, steps: list[tuple[Entry, float]]) -> torch.Tensor:
    start = weight.float()
    total = start.clone()
    for entry, scale in steps:
        total += scale * (entry_tensor(entry).float() - start)
    return total


def _same_weights(file: Path, others: list[Path]) -> None:
    """Refuses runs whose latents are others: their transformers can't be added."""
    ours = read_entries(file)
    for other in others:
        theirs = read_entries(other) if other.exists() else {}
        if theirs.keys() != ours.keys() or any(not _equal(entry, theirs[name]) for name, entry in ours.items()):
            raise CheckpointError(f"{other} differs from {file}: that run wasn't started from this model")


# -------------------------------------------------------------------------------------------------------- whole folders


class _writing:
    """A :class:`FolderWriter` for a folder that appears only if the block ends well."""

    def __init__(self, source: Path, destination: Path) -> None:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise StorageError(f"could not write {destination}: something is there already; choose another folder")
        if source.resolve() in destination.resolve().parents:
            raise StorageError(f"could not write {destination}: it lies in the source; choose another folder")
        need_space(destination, sum(file.stat().st_size for file in source.rglob("*") if file.is_file()))
        self._context = atomic_folder(destination)

    def __enter__(self) -> FolderWriter:
        return FolderWriter(self._context.__enter__())

    def __exit__(self, *error: Any) -> Any:
        return self._context.__exit__(*error)


def _manifest(writer: FolderWriter, facts: Mapping[str, Any]) -> None:
    files = dict(sorted(writer.files.items()))
    checksums = {
        name: entry["sha256"]
        for name, entry in files.items()
        if "/" in name and name.endswith((".safetensors", ".json", ".model"))
    }
    if checksums:
        writer.json(CHECKSUMS_NAME, checksums)
    writer.json(MANIFEST_NAME, {"unialignment": __version__, **facts, "files": dict(sorted(writer.files.items()))})


def _added(weight: torch.Tensor, pair: LoraPair, scale: float) -> torch.Tensor:
    return weight.float() + pair.delta(scale)


def _component_layout(folder: Path) -> str:
    name = read_json(folder / "config.json").get("_class_name")
    layouts = {"UniAlignmentTransformer": "unialignment", PUBLISHED_CLASS: "published"}
    if name not in layouts:
        raise CheckpointError(
            f"{folder} holds a {name}; expected a model folder, or a transformer: {', '.join(layouts)}"
        )
    return layouts[name]


def _to_ours(source: Path, writer: FolderWriter, shard: int) -> int:
    settings = check_transformer(source / "transformer")
    width = int(settings.get("joint_attention_dim", 4096))
    tokenizer = load_t5_tokenizer(source / "tokenizer")
    tokenizer.vocab_size = int(settings.get("vocab_size", 32128))
    mask = load_mask_embedding(source, width)
    check_text_encoder(source / "text_encoder", width)
    check_vae(source / "vae", int(settings.get("in_channels", 16)))
    side = int(settings.get("sample_size", 64)) // int(settings.get("patch_size", 2))
    shift = scheduler_shift(source / "scheduler", side**2)
    count = _transformer_to_ours(source / "transformer", writer, "transformer", shard)
    count += _component(source / "text_encoder", writer, "text_embedder", "model", shard)
    count += _component(source / "vae", writer, "autoencoder", "diffusion_pytorch_model", shard)
    _own_texts(writer, tokenizer, mask, shard)
    for folder in ("scheduler", "tokenizer"):
        for file in sorted((source / folder).iterdir()):
            if file.is_file() and file.suffix not in (".bin", ".pth", ".pt"):
                writer.copy(file, f"{_KEPT}/{folder}/{file.name}")
    writer.copy(source / INDEX_NAME, f"{_KEPT}/{INDEX_NAME}")
    place = _mask_place(source)
    writer.json(f"{_KEPT}/mask.json", {"file": place.relative_to(source).as_posix(), "shape": _mask_shape(place)})
    _own_index(writer, source.name, shift)
    return count + 1


def _own_texts(writer: FolderWriter, tokenizer: TextTokenizer, mask: torch.Tensor, shard: int) -> None:
    """The mask token's embedding and the tokenizer."""
    metadata = {
        **{"mask_token_id": str(tokenizer.mask_token_id), "use_attention_mask": "0"},
        **{"prompt_length": str(PROMPT_LENGTH), "question_first": "1"},
    }
    writer.tensors("text_embedder", "mask_embedding", {_MASK_KEY: tensor_entry(mask)}, shard, metadata)
    tokenizer.save_pretrained(writer.folder / "tokenizer")
    for file in sorted((writer.folder / "tokenizer").iterdir()):
        writer.remember(f"tokenizer/{file.name}")


def _own_index(writer: FolderWriter, name: str, shift: float) -> None:
    writer.json(
        INDEX_NAME,
        {
            "_class_name": "UniAlignmentPipeline",
            "_unialignment_version": __version__,
            "name": name,
            "sampling": sampling_settings(shift),
            **{part: ["unialignment", cls] for part, cls in _OWN_CLASSES.items()},
        },
    )


def _start_from_sd3(source: Path, writer: FolderWriter, shard: int) -> dict[str, Any]:
    """A Stable Diffusion 3 pipeline as a start in our layout; what the manifest says of its tensors."""
    tokenizer, transformer = sd3_tokenizer(source), source / "transformer"
    settings, entries, report = initial_entries(transformer, vocab_size=len(tokenizer))
    _, where = check_text_encoder(source / "text_encoder_3", int(settings.get("joint_attention_dim", 4096)))
    check_vae(source / "vae", int(settings.get("in_channels", 16)))
    side = int(settings["sample_size"]) // int(settings.get("patch_size", 2))
    shift = scheduler_shift(source / "scheduler", side**2)
    writer.tensors("transformer", "diffusion_pytorch_model", entries, shard)
    writer.json("transformer/config.json", {"_class_name": _OWN_CLASSES["transformer"], **settings})
    count = len(entries) + _component(source / "text_encoder_3", writer, "text_embedder", "model", shard)
    count += _component(source / "vae", writer, "autoencoder", "diffusion_pytorch_model", shard)
    _own_texts(writer, tokenizer, token_vector(where, tokenizer.mask_token_id), shard)
    _own_index(writer, source.name, shift)
    logger.warning("%s becomes a starting point, not a trained model: %s", source, report.summary())
    made = {name: list(getattr(report, name)) for name in ("extended", "folded", "new", "dropped")}
    return {"tensors": count + 1, "initialisation": {"copied": len(report.copied), **made}}


def _to_published(source: Path, writer: FolderWriter, shard: int) -> int:
    index = read_json(source / INDEX_NAME)
    for name, cls in _OWN_CLASSES.items():
        entry = index.get(name)
        if not isinstance(entry, list) or entry[-1] != cls:
            found = entry[-1] if isinstance(entry, list) else entry
            raise CheckpointError(f"the published layout needs a {cls} as {name}; {source} has {found}")
    kept = source / _KEPT
    tokenizer = TextTokenizer.from_pretrained(source / "tokenizer")
    count = _transformer_to_published(source / "transformer", writer, "transformer", shard, kept)
    count += _component(source / "text_embedder", writer, "text_encoder", "model", shard)
    count += _component(source / "autoencoder", writer, "vae", "diffusion_pytorch_model", shard)
    mask = _read_mask(source / "text_embedder" / _MASK_FILE)
    place = read_json(kept / "mask.json") if (kept / "mask.json").is_file() else {}
    buffer = io.BytesIO()
    torch.save(mask.reshape(place.get("shape", [-1])), buffer)
    writer.stream(str(place.get("file", "mask_token_emb.pth")), iter([buffer.getvalue()]))
    if (kept / "tokenizer").is_dir():
        for file in sorted((kept / "tokenizer").iterdir()):
            writer.copy(file, f"tokenizer/{file.name}")
    else:
        _write_t5_tokenizer(source / "tokenizer", tokenizer, writer)
    if (kept / "scheduler").is_dir():
        for file in sorted((kept / "scheduler").iterdir()):
            writer.copy(file, f"scheduler/{file.name}")
    else:
        shift = float(((index.get("sampling") or {}).get("generate") or {}).get("shift", 1.0))
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
        writer.json("scheduler/scheduler_config.json", scheduler)
    if (kept / INDEX_NAME).is_file():
        writer.copy(kept / INDEX_NAME, INDEX_NAME)
    else:
        writer.json(INDEX_NAME, {"_class_name": "UniAlignmentPipeline", **_PUBLISHED_CLASSES})
    return count + 1


# ----------------------------------------------------------------------------------------------------------- components


def _own_settings(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _transformer_to_ours(source: Path, writer: FolderWriter, folder: str, shard: int) -> int:
    settings = check_transformer(source)
    entries = read_entries(source)
    extra = {name: entry for name, entry in entries.items() if name.startswith(TRAINING_ONLY)}
    own = {name: entry for name, entry in entries.items() if name not in extra}
    prefix = f"{folder}/" if folder else ""
    writer.tensors(folder, "diffusion_pytorch_model", own, shard)
    writer.json(f"{prefix}config.json", {"_class_name": _OWN_CLASSES["transformer"], **settings})
    kept = f"{_KEPT}/transformer" if folder else _KEPT
    writer.copy(source / "config.json", f"{kept}/config.json")
    if extra:
        writer.tensors(kept, "training_only", extra, 2**62)
    return len(entries)


def _transformer_to_published(source: Path, writer: FolderWriter, folder: str, shard: int, kept: Path | None) -> int:
    settings = _own_settings(source)
    model = empty_transformer(settings, source)
    for key, value in _PUBLISHED_ARITHMETIC.items():
        if model.config[key] != value:
            raise CheckpointError(
                f"{source} has {key}={model.config[key]!r}; the published layout knows only {value!r}, so this model "
                "can't be said in it"
            )
    entries = read_entries(source)
    check_names_and_shapes(model, {name: entry.shape for name, entry in entries.items()}, str(source))
    kept = kept / "transformer" if kept is not None else source / _KEPT
    if (kept / "training_only.safetensors").is_file():
        entries |= read_entries(kept / "training_only.safetensors")
    prefix = f"{folder}/" if folder else ""
    writer.tensors(folder, "diffusion_pytorch_model", entries, shard)
    config = read_json(kept / "config.json") if (kept / "config.json").is_file() else {}
    if any(key in settings and settings[key] != value for key, value in config.items()):
        config = {}  # the weights were changed since
    known = {key: value for key, value in model.config.items() if not key.startswith("_")}
    written = {key: value for key, value in known.items() if key not in (*_PUBLISHED_ARITHMETIC, "max_references")}
    writer.json(f"{prefix}config.json", config or {"_class_name": PUBLISHED_CLASS, **written})
    return len(entries)


def _component(source: Path, writer: FolderWriter, folder: str, stem: str, shard: int) -> int:
    """A component that both layouts store alike: weights streamed, everything that isn't a weight copied."""
    entries = read_entries(source)
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json"):
            writer.copy(file, f"{folder}/{file.name}")
    writer.tensors(folder, stem, entries, shard)
    return len(entries)


def _mask_place(source: Path) -> Path:
    places = (source, source / "transformer", source / "text_encoder", source / "tokenizer")
    return next(path for place in places for path in sorted(place.glob("mask_token_emb*.pth")))


def _mask_shape(path: Path) -> list[int]:
    value = torch.load(path, map_location="cpu", weights_only=True)
    value = next(iter(value.values())) if isinstance(value, dict) else value
    return list(value.shape)


def _read_mask(path: Path) -> torch.Tensor:
    entries: dict[str, Entry] = read_entries(path)
    if set(entries) != {_MASK_KEY}:
        raise CheckpointError(f"{path} must hold one tensor {_MASK_KEY}, has {name_list(entries) or 'none'}")
    from safetensors.torch import load_file

    return load_file(path)[_MASK_KEY]


def _write_t5_tokenizer(source: Path, tokenizer: TextTokenizer, writer: FolderWriter) -> None:
    backend = json.loads((source / "tokenizer.json").read_text("utf-8"))
    tokens = {entry["id"]: entry["content"] for entry in backend.get("added_tokens", ())}
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in tokens or tokenizer.pad_token_id not in tokens:
        raise CheckpointError(f"the tokenizer in {source} is no T5 tokenizer; the published layout needs one")
    writer.copy(source / "tokenizer.json", "tokenizer/tokenizer.json")
    roles = {"pad_token": tokens[tokenizer.pad_token_id], "eos_token": tokens[tokenizer.eos_token_id]}
    writer.json(
        "tokenizer/tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast", **roles, "unk_token": "<unk>"}
    )
