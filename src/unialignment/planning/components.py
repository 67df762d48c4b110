"""A run's components as tensors that have shapes and types but no storage, from its configuration and folders' configs.

Folders that aren't there yet are replaced by what the recipe would have in them, and a note says so. Knows nothing of
what is done with the components.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unialignment.errors import CheckpointError
from unialignment.model.checkpoints import read_json
from unialignment.model.text import TokenEmbedder
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.training import lora
from unialignment.training.build import transformer_arguments
from unialignment.training.config import TransformerConfig

T5_PROMPT, WORLD_PROMPT = 256, 24
"""Condition tokens of a text: with T5, as published; in the scene world's language, about the longest."""
T5_XXL: dict[str, Any] = {
    **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu"},
}
SD3_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    **{"layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024},
    **{"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
}


@dataclass(frozen=True)
class Components:
    """A run's modules, of fake tensors."""

    transformer: UniAlignmentTransformer
    embedder: TokenEmbedder | None
    encoder: nn.Module | None
    autoencoder: Any
    side: int
    """Latent positions along one side of the model's own pictures."""
    trained_side: int
    """The same of the pictures that it is trained on."""

    @property
    def modules(self) -> list[nn.Module]:
        """Those that there are."""
        found = (self.transformer, self.embedder, self.encoder, self.autoencoder)
        return [module for module in found if module is not None]


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Within the block new tensors have no storage."""
    # Random numbers that don't exist must not move the caller's generator.
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        yield


def materialise(parts: Components) -> None:
    """Fake tensors in place of meta ones, which kernels that differ by device would treat differently."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in parts.modules:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
                        made[parameter] = nn.Parameter(tensor, parameter.requires_grad)
                    part._parameters[name] = made[parameter]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _autoencoder(folders: list[Path], published: bool, expected: Path | None, notes: list[str]) -> Any:
    from unialignment.model.autoencoder import build_autoencoder

    for folder in folders:
        if (folder / "config.json").is_file():
            settings = read_json(folder / "config.json")
            name = settings.get("_class_name", "AutoencoderKL")
            return build_autoencoder(name, **{k: v for k, v in settings.items() if not k.startswith("_")})
    if published:
        notes.append("the autoencoder's folder isn't there: Stable Diffusion 3's was assumed")
        return build_autoencoder("AutoencoderKL", **SD3_VAE)
    if expected is not None:
        notes.append(f"no folder {expected}: the scene world's autoencoder was assumed")
        return build_autoencoder("WorldAutoencoder")
    return build_autoencoder("PixelAutoencoder")


def _text_encoder(folder: Path | None, published: bool, notes: list[str]) -> nn.Module | None:
    """In evaluation mode, as it always is: dropout would keep its attention out of fused kernels."""
    from transformers import T5Config, T5EncoderModel

    for name in ("text_embedder", "text_encoder_3", "text_encoder"):
        path = None if folder is None else folder / name / "config.json"
        if path is not None and path.is_file():
            settings = read_json(path)
            if settings.get("_class_name") == "TokenEmbedder":
                return None
            if settings.get("model_type", "t5") == "t5" and "d_model" in settings:
                return T5EncoderModel(T5Config(**settings)).eval()
    if not published:
        return None
    notes.append("the text encoder's folder isn't there: T5-XXL (4.8 B parameters) was assumed")
    return T5EncoderModel(T5Config(**T5_XXL)).eval()


def _vocabulary(config: TransformerConfig) -> int:
    folder = config.text.tokenizer
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return int(read_json(folder / "tokenizer_config.json").get("vocab_size", config.text.vocab_size))
    return config.text.vocab_size


def _initial_settings(folder: Path | None) -> dict[str, Any] | None:
    """Arguments of the transformer that a model folder of any layout holds, or gives."""
    if folder is None or not (folder / "transformer" / "config.json").is_file():
        return None
    from unialignment.model.initialise import SD3_CLASS, sd3_settings
    from unialignment.model.published import load_t5_tokenizer, transformer_settings

    if read_json(folder / "transformer" / "config.json").get("_class_name") == SD3_CLASS:
        vocabulary = len(load_t5_tokenizer(folder / "tokenizer_3")) if (folder / "tokenizer_3").is_dir() else 32100
        return sd3_settings(folder / "transformer", vocab_size=vocabulary)
    return transformer_settings(folder / "transformer")


def build(config: TransformerConfig, notes: list[str]) -> Components:
    """The components of a run, on the meta device.

    Args:
        config: A transformer run.
        notes: Receives what was assumed.

    Raises:
        ConfigError: The configuration contradicts itself.
        CheckpointError: A folder that it names is damaged.
    """
    with torch.device("meta"):
        return _build_on_meta(config, notes)


def _build_on_meta(config: TransformerConfig, notes: list[str]) -> Components:
    published = config.model.flavour == "sd3-medium"
    initial = config.model.initial
    folders = [] if config.autoencoder.path is None else [config.autoencoder.path]
    folders += [] if initial is None else [initial / "autoencoder", initial / "vae"]
    autoencoder = _autoencoder(folders, published, config.autoencoder.path, notes).eval().requires_grad_(False)
    encoder = _text_encoder(initial, published, notes)
    arguments = _initial_settings(initial)
    resolution = config.data.resolution if config.data.sources else {"nano": 64}.get(config.world.preset, 128)
    side = resolution // autoencoder.spatial_factor
    if arguments is None:
        vocabulary = 32128 if encoder is not None else _vocabulary(config)
        arguments = transformer_arguments(config, side, autoencoder.latent_channels, vocabulary)
        if encoder is not None:
            arguments["joint_attention_dim"] = int(cast("Any", encoder).config.d_model)
    transformer = UniAlignmentTransformer(**arguments)
    embedder = None
    if encoder is None:
        embedder = _table(transformer, config.text.max_length)
    else:
        encoder.requires_grad_(False)
        if config.lora.rank and config.lora.base_precision == "bf16":
            nn.Module.to(encoder, torch.bfloat16)
    transformer.gradient_checkpointing = config.run.activation_checkpointing
    if config.lora.rank:
        lora.prepare(transformer, embedder or nn.Module(), config.lora)
    return Components(transformer, embedder, encoder, autoencoder, int(transformer.config.sample_size), side)


def build_folder(folder: str | Path) -> Components:
    """The components of a model folder of any layout, on the meta device, from its configs alone.

    Raises:
        CheckpointError: A config is missing, damaged or of a class that isn't known.
    """
    folder = Path(folder)
    arguments = _initial_settings(folder)
    if arguments is None:
        raise CheckpointError(f"no transformer/config.json in {folder}; the model is incomplete, get it again")
    with torch.device("meta"):
        autoencoder = _autoencoder([folder / "autoencoder", folder / "vae"], False, None, []).eval()
        encoder = _text_encoder(folder, False, [])
        transformer = UniAlignmentTransformer(**arguments).eval()
        embedder = None
        if encoder is None:
            path = folder / "text_embedder" / "config.json"
            embedder = _table(transformer, int(read_json(path).get("max_length", 256)))
    side = int(transformer.config.sample_size)
    return Components(transformer, embedder, encoder, autoencoder, side, side)


def has_text_encoder(folder: str | Path) -> bool:
    """Whether a model folder's text embedder is a T5 encoder rather than a table.

    Raises:
        CheckpointError: A config is damaged.
    """
    with torch.device("meta"):
        return _text_encoder(Path(folder), False, []) is not None


def _table(transformer: UniAlignmentTransformer, length: int) -> TokenEmbedder:
    return TokenEmbedder(transformer.config.vocab_size, transformer.config.joint_attention_dim, length)


def prompt_tokens_of(parts: Components, given: int | None) -> int:
    """Condition tokens of a text, as given or as is usual."""
    return given or (WORLD_PROMPT if parts.encoder is None else T5_PROMPT)


def embed(parts: Components, batch: int, length: int) -> Tensor:
    """What reading ``batch`` texts of ``length`` tokens gives and takes."""
    if parts.embedder is not None:
        return parts.embedder.embed(torch.zeros(batch, length, dtype=torch.long))
    assert parts.encoder is not None
    width = parts.transformer.config.joint_attention_dim
    if not length:
        return torch.empty(batch, 0, width)
    with torch.no_grad():
        dtype = next(parts.encoder.parameters()).dtype
        return parts.encoder(inputs_embeds=torch.empty(batch, length, width, dtype=dtype)).last_hidden_state


def shorten(parts: Components) -> None:
    """A frozen encoder's working memory doesn't grow with its depth: two blocks tell as much as all."""
    stack = getattr(parts.encoder, "encoder", None)
    if stack is not None:
        stack.block = stack.block[:2]
