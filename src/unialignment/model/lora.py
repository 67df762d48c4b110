"""LoRA files: read in diffusers' or kohya's form, fitted to the transformer by name and shape, saved, merged.

The adapters themselves are PEFT's, through diffusers' ``PeftAdapterMixin``. Everything is compared before the model is
touched; what a file holds but the model has no place for is listed with its reason, never dropped in silence. Knows
nothing of training.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unialignment.errors import CheckpointError, ConfigError, InputError
from unialignment.model.checkpoints import name_list, open_weights
from unialignment.storage import storage_error

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""diffusers' name of a LoRA file in a folder."""
PREFIX = "transformer."
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections of both streams."""
_METADATA = "lora_adapter_metadata"  # diffusers' key for the adapter's configuration
_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up"}
_KEY = re.compile(r"^(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.default)?\.weight$")
_OURS_TO_SD3 = {"image_proj_out": "proj_out", "image_norm_out.linear": "norm_out.linear"}
_SD3_TO_OURS = {theirs: ours for ours, theirs in _OURS_TO_SD3.items()}
_ENCODERS = ("text_encoder", "lora_te", "te1", "te2", "te3", "unet.")


@dataclass(frozen=True)
class LoraPair:
    """One low-rank change of a linear layer's weight, ``alpha / rank * up @ down``.

    Attributes:
        down: ``[rank, in]``.
        up: ``[out, rank]``.
        alpha: Scale numerator; equals the rank where a file doesn't say.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner width."""
        return int(self.down.shape[0])

    def delta(self, scale: float = 1.0) -> Tensor:
        """The change of the weight, float32 ``[out, in]``."""
        return (scale * self.alpha / self.rank) * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class LoraReport:
    """What became of a LoRA file.

    Attributes:
        form: ``"diffusers"`` or ``"kohya"``.
        matched: Layers of the transformer that it changes.
        unmatched: Key or layer of the file → why the model has no place for it.
    """

    form: str
    matched: tuple[str, ...]
    unmatched: Mapping[str, str]

    def summary(self) -> str:
        """One sentence."""
        text = f"{len(self.matched)} layers matched ({self.form} form)"
        if self.unmatched:
            shown = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.unmatched.items())[:4])
            more = f"; and {len(self.unmatched) - 4} more" if len(self.unmatched) > 4 else ""
            text += f", {len(self.unmatched)} unmatched ({shown}{more})"
        return text


# --------------------------------------------------------------------------------------------------- reading files


def find_lora(path: str | Path) -> Path:
    """The LoRA file that a path means: the file itself, or the one in a folder.

    Raises:
        CheckpointError: There is none, or several.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no LoRA at {path}; check the path")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a .safetensors file; other formats can run code, so they are refused")
        return path
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = f"several ({name_list(file.name for file in found)})" if found else "none"
        raise CheckpointError(f"expected {WEIGHTS_NAME} or one .safetensors file in {path}, found {names}")
    return found[0]


def read_lora(path: str | Path, transformer: nn.Module) -> tuple[dict[str, LoraPair], LoraReport]:
    """Read a LoRA file and fit it to a transformer, which is only looked at (it may be on the meta device).

    Understood are diffusers' form (``transformer.<layer>.lora_A.weight``, or ``lora_down``/``lora_up``, with optional
    ``alpha``), and kohya's (``lora_unet_<layer with underscores>``), with SD 3's layer names in diffusers' or in the
    original spelling (``joint_blocks.0.x_block.attn.qkv``, whose three projections are fused there and split here).

    Args:
        path: A file, or a folder with one.
        transformer: A ``UniAlignmentTransformer``.

    Returns:
        Layer name → its change, and the report.

    Raises:
        CheckpointError: It is missing, damaged, no LoRA, of an unsupported kind (DoRA, LoHa, LoKr), or nothing fits.
    """
    file = find_lora(path)
    with open_weights(file) as opened:
        metadata = opened.metadata() or {}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    special = [key for key in state if any(word in key for word in ("dora_scale", "hada_", "lokr_", "lora_magnitude"))]
    if special:
        raise CheckpointError(
            f"{file} holds DoRA, LoHa or LoKr weights ({name_list(special)}), which aren't supported; use plain LoRA"
        )
    halves, alphas, unmatched = _collect(state)
    if not halves:
        raise CheckpointError(f"{file} is no LoRA: none of its {len(state)} tensors is named lora_A, lora_down, …")
    kohya = any(name.startswith(("lora_unet_", "lora_transformer_")) for name in halves)
    default_alpha = _alpha_rule(metadata)
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    table = _names(transformer, layers)
    pairs: dict[str, LoraPair] = {}
    for name, parts in halves.items():
        if set(parts) != {"down", "up"}:
            unmatched[name] = f"has no {'up' if 'down' in parts else 'down'} half"
            continue
        if name.startswith(_ENCODERS):
            unmatched[name] = "belongs to a text encoder that this model doesn't have"
            continue
        down, up = parts["down"], parts["up"]
        if down.ndim == 4 and up.ndim == 4:
            down, up = down.flatten(1), up.flatten(1)
        alpha = alphas.get(name, default_alpha(name, down.shape[0]))
        destination = table.get(_plain(name))
        if destination is None:
            unmatched[name] = "no such layer"
            continue
        _place(name, destination, LoraPair(down, up, alpha), layers, pairs, unmatched)
    for name in alphas.keys() - halves.keys():
        unmatched[f"{name}.alpha"] = "an alpha without weights"
    report = LoraReport("kohya" if kohya else "diffusers", tuple(sorted(pairs)), unmatched)
    if not pairs:
        raise CheckpointError(f"{file} doesn't fit this model: {report.summary()}; is it for another architecture?")
    return pairs, report


def _collect(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], dict[str, str]]:
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    alphas: dict[str, float] = {}
    unmatched: dict[str, str] = {}
    for key, value in state.items():
        match = _KEY.match(key)
        if match:
            halves[match[1]][_PARTS[match[2]]] = value
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(value)
        else:
            unmatched[key] = "not a LoRA weight"
    return dict(halves), alphas, unmatched


def _alpha_rule(metadata: Mapping[str, str]) -> Any:
    """Alpha of a layer without an ``alpha`` tensor: from diffusers' metadata if there is any, else the rank."""
    settings: dict[str, Any] = {}
    if _METADATA in metadata:
        try:
            found = json.loads(metadata[_METADATA])
            settings = {k.removeprefix(PREFIX): v for k, v in found.items() if k.startswith(PREFIX)}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"the LoRA's {_METADATA} is damaged: {error}; save it again") from error

    def alpha(name: str, rank: int) -> float:
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name.removeprefix(PREFIX)):
                return float(value)
        return float(settings.get("lora_alpha") or rank)

    return alpha


def _plain(name: str) -> str:
    """A layer's name in a file, without prefixes, with one separator."""
    for prefix in ("base_model.model.", PREFIX, "diffusion_model.", "model.diffusion_model."):
        name = name.removeprefix(prefix)
    name = re.sub(r"\.processor\.(\w+?)$", r".\1", name)
    return re.sub(r"^lora_(unet|transformer)_", "", name).replace(".", "_")


@dataclass(frozen=True)
class _Place:
    """Where one layer of a file goes: several layers for fused projections; halves swapped for final modulations."""

    layers: tuple[str, ...]
    swap: bool = False  # file says (shift, scale), the model (scale, shift), or the other way round


def _names(transformer: nn.Module, layers: Iterable[str]) -> dict[str, _Place]:
    """Every spelling of every layer, with underscores for dots."""
    table = {name.replace(".", "_"): _Place((name,)) for name in layers}
    table |= {theirs.replace(".", "_"): _Place((ours,)) for theirs, ours in _SD3_TO_OURS.items()}
    table["pos_embed_proj"] = _Place(("pos_embed.proj",))
    table |= {
        "x_embedder_proj": _Place(("pos_embed.proj",)),
        "t_embedder_mlp_0": _Place(("time_text_embed.timestep_embedder.linear_1",)),
        "t_embedder_mlp_2": _Place(("time_text_embed.timestep_embedder.linear_2",)),
        "final_layer_linear": _Place(("image_proj_out",)),
        "final_layer_adaLN_modulation_1": _Place(("image_norm_out.linear",), swap=True),
    }
    blocks = cast("Any", transformer).config.num_layers
    for index in range(blocks):
        base, theirs = f"transformer_blocks.{index}.", f"joint_blocks_{index}_"
        # In the last block the context only ends in a norm: (scale, shift) in diffusers, in the original reversed.
        last = index == blocks - 1
        for stream, attention, output, feed_forward, norm in (
            ("x_block_", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
            ("context_block_", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
        ):
            table[f"{theirs}{stream}attn_qkv"] = _Place(tuple(f"{base}attn.{name}" for name in attention))
            table[f"{theirs}{stream}attn_proj"] = _Place((f"{base}attn.{output}",))
            table[f"{theirs}{stream}mlp_fc1"] = _Place((f"{base}{feed_forward}.net.0.proj",))
            table[f"{theirs}{stream}mlp_fc2"] = _Place((f"{base}{feed_forward}.net.2",))
            table[f"{theirs}{stream}adaLN_modulation_1"] = _Place((f"{base}{norm}.linear",), swap=last)
        table[f"{theirs}x_block_attn2_qkv"] = _Place(tuple(f"{base}attn2.{n}" for n in ("to_q", "to_k", "to_v")))
        table[f"{theirs}x_block_attn2_proj"] = _Place((f"{base}attn2.to_out.0",))
        # SimpleTuner and early diffusers scripts name the attention's output without its index.
        table.setdefault(f"transformer_blocks_{index}_attn_to_out", _Place((f"{base}attn.to_out.0",)))
    return table


def _place(
    name: str,
    place: _Place,
    pair: LoraPair,
    layers: Mapping[str, nn.Linear],
    pairs: dict[str, LoraPair],
    unmatched: dict[str, str],
) -> None:
    count = len(place.layers)
    if pair.up.shape[0] % count or pair.up.shape[1] != pair.down.shape[0]:
        unmatched[name] = f"halves {list(pair.up.shape)} and {list(pair.down.shape)} don't go together"
        return
    for layer, up in zip(place.layers, pair.up.chunk(count), strict=True):
        module = layers.get(layer)
        if module is None:
            absent = "the patch projection can't be adapted here" if layer == "pos_embed.proj" else "no such layer"
            unmatched[name] = absent
            continue
        width = module.in_features
        if layer.endswith("norm1_context.linear") and up.shape[0] == 2 * width and module.out_features > 2 * width:
            # SD 3's last block modulates its context by shift and scale only; here it has all six. `swap` is set for
            # the original spelling, which has the order that is wanted here.
            halves = up if place.swap else torch.cat(up.chunk(2)[::-1])
            up = torch.cat([halves, halves.new_zeros(module.out_features - 2 * width, halves.shape[1])])
        elif place.swap and layer == "image_norm_out.linear":
            up = torch.cat(up.chunk(2)[::-1])
        if (up.shape[0], pair.down.shape[1]) != (module.out_features, width):
            unmatched[name] = (
                f"is for {pair.down.shape[1]} → {up.shape[0]} channels, {layer} has {width} → {module.out_features}"
            )
            continue
        if layer in pairs:
            raise CheckpointError(f"the LoRA changes {layer} twice, under two names; it can't be told which is meant")
        pairs[layer] = LoraPair(pair.down, up, pair.alpha)


# ------------------------------------------------------------------------------------------------- adapters in a model


def add_lora(
    transformer: Any,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    name: str = "default",
) -> tuple[str, ...]:
    """Give a transformer a new adapter, which changes nothing yet (its second half is zero), and freeze all else.

    Args:
        transformer: A ``UniAlignmentTransformer``.
        rank: Inner width.
        alpha: Scale numerator; the rank unless given.
        targets: Ends of layer names, for example ``"attn.to_q"`` or ``"ff.net.2"``.
        name: Of the adapter.

    Returns:
        The adapted layers.

    Raises:
        ConfigError: A target fits no linear layer.
    """
    linears = [key for key, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    chosen: list[str] = []
    for target in targets:
        found = [key for key in linears if key == target or key.endswith(f".{target}")]
        if not found:
            known = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", key) for key in linears})
            raise ConfigError(f"lora target {target!r} fits no linear layer; known ends of names: {', '.join(known)}")
        chosen += [key for key in found if key not in chosen]
    _inject(transformer, dict.fromkeys(chosen, rank), dict.fromkeys(chosen, float(alpha or rank)), name)
    return tuple(sorted(chosen))


def load_lora(transformer: Any, path: str | Path, scale: float = 1.0, name: str = "default") -> LoraReport:
    """Load a LoRA file as an adapter, all or nothing; see :func:`read_lora`.

    Args:
        transformer: A ``UniAlignmentTransformer``.
        path: A file, or a folder with one.
        scale: Strength; 1 is as trained.
        name: Of the adapter; one that is there already is refused.

    Raises:
        CheckpointError: The file is unusable; the transformer is then untouched.
        InputError: The name is taken.
    """
    if name in getattr(transformer, "peft_config", {}):
        raise InputError(f"an adapter {name!r} is loaded already; remove it or choose another name")
    pairs, report = _read_for(transformer, path)
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    _inject(transformer, ranks, {layer: pair.alpha for layer, pair in pairs.items()}, name)
    with torch.no_grad():
        for layer, pair in pairs.items():
            module = transformer.get_submodule(layer)
            module.lora_A[name].weight.copy_(pair.down)
            module.lora_B[name].weight.copy_(pair.up)
    set_scale(transformer, scale, name)
    return report


def _read_for(transformer: Any, path: str | Path) -> tuple[dict[str, LoraPair], LoraReport]:
    """:func:`read_lora` for a transformer that may carry adapters, whose layers then have other names."""
    if not getattr(transformer, "peft_config", {}):
        return read_lora(path, transformer)
    with torch.device("meta"):
        bare = type(transformer)(**{k: v for k, v in transformer.config.items() if not k.startswith("_")})
    return read_lora(path, bare)


def _inject(transformer: Any, ranks: Mapping[str, int], alphas: Mapping[str, float], name: str) -> None:
    from peft import LoraConfig

    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # `^`: a full name, not the end of another one.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern={f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(layer)}": a for layer, a in alphas.items() if a != alpha},
    )
    transformer.add_adapter(config, adapter_name=name)


def set_scale(transformer: Any, scale: float, name: str = "default") -> None:
    """Set an adapter's strength; 0 switches it off, 1 is as trained."""
    transformer.set_adapters(name, weights=scale)


def adapter_names(transformer: Any) -> tuple[str, ...]:
    """Adapters that a transformer carries."""
    return tuple(getattr(transformer, "peft_config", {}))


def lora_pairs(transformer: Any, name: str = "default") -> dict[str, LoraPair]:
    """A loaded or trained adapter as plain pairs, by layer; tensors are the adapter's own.

    Raises:
        InputError: There is no such adapter.
    """
    if name not in adapter_names(transformer):
        raise InputError(f"no adapter {name!r}; there are: {', '.join(adapter_names(transformer)) or 'none'}")
    return {
        layer: LoraPair(module.lora_A[name].weight, module.lora_B[name].weight, float(module.lora_alpha[name]))
        for layer, module in transformer.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


def save_lora(transformer: Any, path: str | Path, name: str = "default") -> Path:
    """Write an adapter as a LoRA file in diffusers' form, atomically.

    Args:
        transformer: A transformer with the adapter.
        path: A ``.safetensors`` file, or a folder, which then gets ``pytorch_lora_weights.safetensors``.
        name: Of the adapter.

    Returns:
        The file.

    Raises:
        InputError: There is no such adapter.
        StorageError: It can't be written.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    pairs = lora_pairs(transformer, name)
    state: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        for half, tensor in (("lora_A", pair.down), ("lora_B", pair.up)):
            key = f"{PREFIX}{_OURS_TO_SD3.get(layer, layer)}.{half}.weight"
            state[key] = tensor.detach().cpu().contiguous().clone()
    config = transformer.peft_config[name]
    renamed = {re.escape(ours): re.escape(theirs) for ours, theirs in _OURS_TO_SD3.items()}

    def pattern(values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"^{renamed.get(key.removeprefix('^'), key.removeprefix('^'))}": value for key, value in values.items()}

    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": pattern(config.rank_pattern),
        "alpha_pattern": pattern(config.alpha_pattern),
        "target_modules": sorted(_OURS_TO_SD3.get(layer, layer) for layer in pairs),
    }
    metadata = {"format": "pt", _METADATA: json.dumps({f"{PREFIX}{k}": v for k, v in settings.items()}, sort_keys=True)}
    temporary = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, str(temporary), metadata=metadata)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise storage_error(file, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


@torch.no_grad()
def merge_lora(transformer: Any, name: str = "default") -> None:
    """Add an adapter, at its present strength, to the weights and remove all adapters: the same outputs, plain layers.

    Raises:
        InputError: There is no such adapter.
    """
    pairs = lora_pairs(transformer, name)
    deltas = {
        layer: transformer.get_submodule(layer).scaling[name] * (pair.up.float() @ pair.down.float())
        for layer, pair in pairs.items()
    }
    transformer.unload_lora()
    for layer, delta in deltas.items():
        weight = transformer.get_submodule(layer).weight
        weight.copy_((weight.float() + delta).to(weight.dtype))
