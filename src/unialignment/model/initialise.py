"""Stable Diffusion 3 and 3.5 medium (diffusers' layout) as the start of a model of ours, every tensor accounted for.

What their ``SD3Transformer2DModel`` lacks is new: the text half of the last block, the text head and the "no picture"
tokens. What ours lacks is dropped: the pooled projection, whose answer to an all-zero pooled prompt is a constant that
is folded into the time embedding's bias, so that the image path is then exactly theirs. Knows nothing of training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.errors import CheckpointError, InputError
from unialignment.model.checkpoints import find_weights, name_list, read_json
from unialignment.model.published import (
    LoadedModel,
    LoadOptions,
    assemble,
    check_class,
    empty_transformer,
    fill,
    load_t5_tokenizer,
    load_text_encoder,
    load_vae,
    read_tensors,
    tensor_shapes,
)
from unialignment.model.streaming import Entry, read_entries, tensor_entry
from unialignment.model.text import T5TextEmbedder
from unialignment.model.tokenizer import TextTokenizer
from unialignment.model.transformer import UniAlignmentTransformer

logger = logging.getLogger(__name__)

SD3_CLASS = "SD3Transformer2DModel"
_POOLED = "time_text_embed.text_embedder."
_TIME_BIAS = "time_text_embed.timestep_embedder.linear_2.bias"
_RENAMED = {"norm_out.": "image_norm_out.", "proj_out.": "image_proj_out."}
_SETTINGS = (
    *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim"),
    *("num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pos_embed_max_size"),
    *("dual_attention_layers", "qk_norm"),
)
_SD3_DEFAULTS = {"sample_size": 128, "caption_projection_dim": 1152}
"""Of diffusers' class where they aren't ours."""


@dataclass(frozen=True)
class Initialisation:
    """What became of every tensor; names are ours, but for ``dropped``.

    Attributes:
        copied: Tensors taken over, renamed ones included.
        extended: Taken over in part; the rest is new.
        folded: Changed by what was dropped.
        new: Not in the source at all: random, or zero where the architecture starts from zero.
        dropped: The source's that have no place here.
    """

    copied: tuple[str, ...]
    extended: tuple[str, ...]
    folded: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def summary(self) -> str:
        """All names but the copied ones, in a few lines."""
        lines = [f"{len(self.copied)} tensors copied; the model has to be trained before it can write texts"]
        for what in ("new", "extended", "folded", "dropped"):
            names = getattr(self, what)
            lines.append(f"{len(names)} {what}: {', '.join(names) or 'none'}")
        return "\n".join(lines)


def sd3_settings(folder: str | Path, *, vocab_size: int, **changes: Any) -> dict[str, Any]:
    """Arguments of ``UniAlignmentTransformer`` for a ``SD3Transformer2DModel`` folder.

    Raises:
        CheckpointError: The folder is incomplete or of another architecture.
    """
    config = {**_SD3_DEFAULTS, **check_class(Path(folder), (SD3_CLASS,))}
    settings = {key: config[key] for key in _SETTINGS if key in config}
    settings["dual_attention_layers"] = tuple(settings.get("dual_attention_layers") or ())
    return {**settings, "vocab_size": vocab_size, **changes}


def initialise_from_sd3(
    folder: str | Path,
    *,
    vocab_size: int = 32100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[UniAlignmentTransformer, Initialisation]:
    """Turn a ``SD3Transformer2DModel`` folder into a transformer of ours.

    Args:
        folder: The transformer's, with ``config.json`` and safetensors (sharded or not, half precision or not).
        vocab_size: Tokens of the new text head; 32100 for T5's tokenizer.
        seed: Of the new tensors.
        dtype: Of the result.
        changes: Settings of :class:`~unialignment.model.transformer.UniAlignmentTransformer` that Stable Diffusion
            doesn't have, such as ``attention_mode="prefix"`` or ``embedding_dim``.

    Returns:
        The model, in evaluation mode, and what became of every tensor.

    Raises:
        CheckpointError: Something is missing, damaged or of another architecture.
    """
    folder = Path(folder)
    settings = sd3_settings(folder, vocab_size=vocab_size, **changes)
    start = _start(folder, settings, seed)
    state = {ours: value.to(dtype) for ours, value in start.made.items()}
    copied = read_tensors({name: start.where[name] for name in start.copied.values()}, dtype)
    state |= {ours: copied[theirs] for ours, theirs in start.copied.items()}
    fill(start.model, state, str(folder))
    return start.model.eval(), start.report


def initial_entries(
    folder: str | Path, *, vocab_size: int = 32100, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Entry], Initialisation]:
    """The same as :func:`initialise_from_sd3` for writing, without reading more than the few tensors that are made.

    Tensors that are taken over keep their type; what is made is in float32, so that what is read back is the same.

    Args:
        folder: The transformer's.
        vocab_size: Tokens of the new text head.
        seed: Of the new tensors.

    Returns:
        Arguments of ``UniAlignmentTransformer``, its tensors, and what became of every tensor.

    Raises:
        CheckpointError: Something is missing, damaged or of another architecture.
    """
    folder = Path(folder)
    settings = sd3_settings(folder, vocab_size=vocab_size)
    start, theirs = _start(folder, settings, seed), read_entries(folder)
    entries = {ours: theirs[name] for ours, name in start.copied.items()}
    return settings, entries | {ours: tensor_entry(value) for ours, value in start.made.items()}, start.report


def sd3_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a Stable Diffusion 3 pipeline's T5 encoder.

    Raises:
        CheckpointError: It or the encoder is missing or damaged.
    """
    if not (folder / "text_encoder_3").is_dir():
        raise CheckpointError(f"{folder} has no text_encoder_3 (T5), which reads all texts here; get it too")
    return load_t5_tokenizer(folder / "tokenizer_3")


def load_sd3(folder: str | Path, options: LoadOptions | None = None, *, seed: int = 0) -> LoadedModel:
    """Load a Stable Diffusion 3 or 3.5 pipeline folder as the start of a model of ours.

    The T5 encoder (``text_encoder_3``, ``tokenizer_3``) is the text embedder, with ``<extra_id_0>``'s own embedding for
    the mask; the two CLIP encoders are not used.

    Raises:
        CheckpointError: Something is missing, damaged, or doesn't belong with the rest.
        InputError: Quantized weights are asked for.
    """
    folder, chosen = Path(folder), options or LoadOptions()
    if chosen.quantize:
        raise InputError(
            f"{folder} is only a start for training, which needs plain weights; leave quantize out, or save it first"
        )
    tokenizer = sd3_tokenizer(folder)
    config = read_json(folder / "transformer" / "config.json")
    width = int(config.get("joint_attention_dim", 4096))
    vae = load_vae(folder / "vae", int(config.get("in_channels", 16)))

    def initial() -> tuple[UniAlignmentTransformer, Initialisation]:
        return initialise_from_sd3(folder / "transformer", vocab_size=len(tokenizer), seed=seed, dtype=chosen.dtype)

    transformer, report = initial()
    if chosen.lazy:  # what became of its tensors is known; they are read again when they are needed
        transformer = empty_transformer(sd3_settings(folder / "transformer", vocab_size=len(tokenizer)), folder).eval()
    encoder = load_text_encoder(folder / "text_encoder_3", width, chosen.dtype)
    loaded = assemble(folder, transformer, encoder, tokenizer, vae, None)
    logger.warning("%s is a starting point, not a trained model: %s", folder, report.summary())

    def embedder() -> T5TextEmbedder:
        encoder = load_text_encoder(folder / "text_encoder_3", width, chosen.dtype)
        return T5TextEmbedder(encoder, tokenizer.mask_token_id).eval()

    return replace(
        loaded, initialisation=report, loaders={"text_embedder": embedder, "transformer": lambda: initial()[0]}
    )


# ------------------------------------------------------------------------------------------------------------- details


@dataclass(frozen=True)
class _Start:
    """A start before its large tensors are read: ``copied`` is our name → theirs, ``made`` is in float32."""

    model: UniAlignmentTransformer
    where: Mapping[str, Path]
    copied: Mapping[str, str]
    made: Mapping[str, Tensor]
    report: Initialisation


def _start(folder: Path, settings: Mapping[str, Any], seed: int) -> _Start:
    model, where = empty_transformer(settings, folder), find_weights(folder)
    last = f"transformer_blocks.{model.config.num_layers - 1}."
    needed = _needed_names(model, last, tensor_shapes(where), folder)
    extended = [f"{last}norm1_context.linear.{kind}" for kind in ("weight", "bias")]
    changed = read_tensors({name: where[name] for name in (_TIME_BIAS, *extended)}, torch.float32)
    pooled = read_tensors({name: path for name, path in where.items() if name.startswith(_POOLED)}, torch.float32)
    donor = _donor(settings, seed)
    made = {_TIME_BIAS: changed[_TIME_BIAS] + _pooled_constant(pooled)}
    for name in extended:
        made[name] = _extend(changed[name], donor[name.replace(last, "transformer_blocks.0.")])
    copied = {_our_name(name): name for name in needed if name not in made}
    new = sorted(set(model.state_dict()) - set(copied) - set(made))
    made |= {name: donor[name.replace(last, "transformer_blocks.0.")] for name in new}
    report = Initialisation(
        tuple(sorted(copied)), tuple(extended), (_TIME_BIAS,), tuple(new), tuple(sorted(set(where) - set(needed)))
    )
    return _Start(model, where, copied, made, report)


def _our_name(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _needed_names(
    model: UniAlignmentTransformer, last: str, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> list[str]:
    """Names of the source's tensors to take over, once all that should be there are, in the right shapes."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    width = wanted["context_embedder.weight"][0]
    for kind in ("weight", "bias"):
        name = f"{last}norm1_context.linear.{kind}"
        wanted[name] = (2 * width, *wanted[name][1:])
    theirs = {_our_name(name): shape for name, shape in shapes.items() if not name.startswith(_POOLED)}
    absent = {name for name in set(wanted) - set(theirs) if not _may_be_new(name, last)}
    absent |= {f"{_POOLED}{part}" for part in _POOLED_PARTS} - set(shapes)
    extra = set(theirs) - set(wanted)
    wrong = [name for name in set(wanted) & set(theirs) if wanted[name] != theirs[name]]
    problems = [
        f"{len(names)} {what} ({name_list(names)})"
        for what, names in (("missing", absent), ("unexpected", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"weights {folder} aren't those of the {SD3_CLASS} that its config describes: tensors "
            f"{', '.join(problems)}; use the weights and config of one and the same model"
        )
    return [name for name in shapes if not name.startswith(_POOLED)]


_POOLED_PARTS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
_NEW_ANYWHERE = ("text_proj_out.", "null_image_embd", "reference_embed.", "condition_text_embed", "aligned_proj.")
_NEW_HEADS = ("image_embedding_head.", "text_embedding_head.")


def _may_be_new(name: str, last: str) -> bool:
    return name.startswith((*_NEW_ANYWHERE, *_NEW_HEADS, f"{last}ff_context.", f"{last}attn.to_add_out."))


def _pooled_constant(pooled: Mapping[str, Tensor]) -> Tensor:
    """What the pooled projection adds to the time embedding when the pooled prompt is all zeros."""
    part = {name.removeprefix(_POOLED): value for name, value in pooled.items()}
    return F.linear(F.silu(part["linear_1.bias"]), part["linear_2.weight"], part["linear_2.bias"])


def _extend(theirs: Tensor, new: Tensor) -> Tensor:
    """The last block's text norm, ``(scale, shift)`` in theirs, as the ``(shift, scale, four more)`` of every block.

    The four are the gates and the feed-forward's norm; they start from zero, as in adaLN-Zero, so that the new half of
    the block passes text through unchanged.
    """
    scale, shift = theirs.chunk(2)
    return torch.cat([shift, scale, new[theirs.shape[0] :].to(theirs.dtype)])


def _donor(settings: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Freshly initialised tensors of a one-block model of the same width: all that can be new, at little cost."""
    small = {**settings, "num_layers": 1, "dual_attention_layers": (), "pos_embed_max_size": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(UniAlignmentTransformer(**small).state_dict())
