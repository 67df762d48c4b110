"""A larger model that computes what a smaller one does: more blocks, wider feed-forwards, the function unchanged.

Training can go on from there instead of from nothing. Added blocks are copies of the block before them whose output
projections are zero, so that they pass everything through (block expansion, Wu et al., "LLaMA Pro", arXiv 2401.02415);
added feed-forward units draw their input weights at random and have output weights of zero (function preservation as in
Net2Net, Chen et al., arXiv 1511.05641). Both get gradients from the first step. Like the other conversions, it streams
from file to file and every destination appears whole or not at all. Knows nothing of training.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from unialignment.errors import CheckpointError, InputError
from unialignment.model.checkpoints import read_json
from unialignment.model.convert import DEFAULT_SHARD, copy_changed
from unialignment.model.folders import verify_checksums
from unialignment.model.layouts import folder_layout
from unialignment.model.streaming import Entry, entry_tensor, parse_size, read_entries, replaced, tensor_entry

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_OUTPUTS = ("attn.to_out.0.", "attn.to_add_out.", "attn2.to_out.0.", "ff.net.2.", "ff_context.net.2.")
"""What a block adds to its streams, it adds through these."""
_FIRST = ("ff.net.0.proj.", "ff_context.net.0.proj.")
_SECOND = ("ff.net.2.weight", "ff_context.net.2.weight")


def grow(
    model: str | Path,
    destination: str | Path,
    num_layers: int | None = None,
    mlp_ratio: float | None = None,
    seed: int = 0,
    max_shard_size: str | int = DEFAULT_SHARD,
) -> dict[str, Any]:
    """Write a larger model folder with the same outputs.

    Args:
        model: A folder of our layout; only read.
        destination: Folder to write; must not exist or be empty.
        num_layers: Blocks of the new model; added ones are spread evenly between the old. Default: as many.
        mlp_ratio: Feed-forward width of the new one as a multiple of the width. Default: the same.
        seed: Of the added units' input weights.
        max_shard_size: Largest weight file.

    Returns:
        ``{"num_layers": [before, after], "mlp_ratio": [before, after], "parameters": [before, after]}``, parameters of
        the transformer.

    Raises:
        InputError: The new sizes aren't larger, or not by whole units.
        CheckpointError: The folder is unusable, or has another layout.
        StorageError: It can't be written; nothing is left half-written.
    """
    model, shard = Path(model), parse_size(max_shard_size)
    if folder_layout(model) != "unialignment":
        raise CheckpointError(f"{model} isn't a model folder of our layout; `unialign convert` makes one of it")
    verify_checksums(model)
    config = read_json(model / "transformer" / "config.json")
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    layers, ratio = int(config["num_layers"]), float(config["mlp_ratio"])
    wanted_layers = layers if num_layers is None else num_layers
    wanted_ratio = ratio if mlp_ratio is None else float(mlp_ratio)
    if wanted_layers < layers or wanted_ratio < ratio or (wanted_layers, wanted_ratio) == (layers, ratio):
        raise InputError(
            f"the model has {layers} blocks and a feed-forward of {ratio:g} times its width; give more blocks than "
            f"that, or a larger multiple (got {wanted_layers} and {wanted_ratio:g})"
        )
    hidden = width * wanted_ratio
    if hidden != int(hidden):
        raise InputError(f"mlp_ratio={wanted_ratio:g}: {width} times that is no whole number of units")
    sources = block_sources(layers, wanted_layers)
    old = read_entries(model / "transformer")
    new = _expanded(old, sources)
    if wanted_ratio > ratio:
        generator = torch.Generator().manual_seed(seed)
        for name in list(new):
            new[name] = _widened(name, new[name], int(hidden), generator)
    dual = [index for index, (block, _) in enumerate(sources) if block in (config.get("dual_attention_layers") or ())]
    changed = {**config, "num_layers": wanted_layers, "mlp_ratio": wanted_ratio, "dual_attention_layers": dual}
    facts = {
        "num_layers": [layers, wanted_layers],
        "mlp_ratio": [ratio, wanted_ratio],
        "parameters": [_parameters(old), _parameters(new)],
    }
    copy_changed(model, Path(destination), {"transformer": new}, {"transformer/config.json": changed}, shard, facts)
    return facts


def block_sources(layers: int, wanted: int) -> list[tuple[int, bool]]:
    """For each block of the larger model, which old block it is or copies, and whether it is an added one.

    >>> block_sources(2, 4)
    [(0, False), (0, True), (1, False), (1, True)]
    """
    added, sources = wanted - layers, []
    for index in range(layers):
        copies = (index + 1) * added // layers - index * added // layers
        sources += [(index, False), *[(index, True)] * copies]
    return sources


def _expanded(old: dict[str, Entry], sources: list[tuple[int, bool]]) -> dict[str, Entry]:
    new = {name: entry for name, entry in old.items() if not _BLOCK.fullmatch(name)}
    parts: dict[int, dict[str, Entry]] = {}
    for name, entry in old.items():
        if found := _BLOCK.fullmatch(name):
            parts.setdefault(int(found[1]), {})[found[2]] = entry
    for index, (block, is_added) in enumerate(sources):
        for part, entry in parts[block].items():
            silent = is_added and part.startswith(_OUTPUTS)
            new[f"transformer_blocks.{index}.{part}"] = replaced(entry, torch.zeros_like) if silent else entry
    return new


def _widened(name: str, entry: Entry, hidden: int, generator: torch.Generator) -> Entry:
    part = found[2] if (found := _BLOCK.fullmatch(name)) else ""
    if part.startswith(_FIRST):
        old = entry_tensor(entry)
        rows = hidden - len(old)
        fresh = torch.randn((rows, *old.shape[1:]), generator=generator) * old.float().std()
        return tensor_entry(torch.cat([old, (fresh if part.endswith("weight") else 0 * fresh).to(old.dtype)]))
    if part in _SECOND:
        old = entry_tensor(entry)
        return tensor_entry(torch.cat([old, old.new_zeros(len(old), hidden - old.shape[1])], dim=1))
    return entry


def _parameters(entries: dict[str, Entry]) -> int:
    learned = (entry for name, entry in entries.items() if name != "pos_embed.pos_embed")  # a table of sines
    return sum(int(torch.Size(entry.shape).numel()) for entry in learned)
