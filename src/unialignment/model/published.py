"""The published UniAlignment pipeline folder, read into our components, and what it shares with Stable Diffusion 3.

``transformer/`` (``SD3JointModelFlexible``), ``vae/``, ``text_encoder/`` (T5), ``tokenizer/``, ``scheduler/`` and the
mask token's own embedding, ``mask_token_emb*.pth``. Everything is judged from configs and headers first, built on the
meta device and filled tensor by tensor, so that a model is never there twice nor in part. Knows nothing of tasks beyond
the published sampler settings, nor of how the components compute.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from unialignment.errors import CheckpointError, UniAlignmentError
from unialignment.model.autoencoder import KLAutoencoder
from unialignment.model.checkpoints import check_names_and_shapes, find_weights, name_list, open_weights, read_json
from unialignment.model.quantization import quantization_config
from unialignment.model.text import T5TextEmbedder
from unialignment.model.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from unialignment.model.initialise import Initialisation
    from unialignment.model.transformer import UniAlignmentTransformer

logger = logging.getLogger(__name__)

PUBLISHED_CLASS = "SD3JointModelFlexible"
PROMPT_LENGTH = 256
"""Tokens that prompts are padded to, the padding being seen, in Stable Diffusion 3 and the published pipeline."""
TRAINING_ONLY = ("siglip_adapter_img.", "siglip_adapter_text.")
"""Prefixes of the published alignment projectors: no task needs them, so they aren't loaded."""
_MASK_FILES = "mask_token_emb*.pth"


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder gives.

    Attributes:
        components: ``transformer``, ``text_embedder``, ``autoencoder`` and ``tokenizer``, in evaluation mode.
        settings: ``name`` and ``sampling``, as in our ``model_index.json``.
        initialisation: Which tensors are new, for weights that are only a starting point; else ``None``.
        loaders: Component → makes it anew from its folder, for components that are dropped and needed again.
    """

    components: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    initialisation: Initialisation | None = None
    loaders: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadOptions:
    """How large components are loaded.

    Attributes:
        dtype: Of the transformer and the text encoder.
        lazy: Check the transformer, but leave it without weights until its loader is called.
        quantize: Component → ``"8bit"`` or ``"4bit"``.
        device: Where it will compute; decides the backend of quantized weights.
    """

    dtype: torch.dtype = torch.float32
    lazy: bool = False
    quantize: Mapping[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def quantization(self, component: str) -> Any:
        """What the component's library takes as ``quantization_config``; ``None``: nothing is quantized.

        Raises:
            InputError: The backend isn't there.
        """
        if component not in self.quantize:
            return None
        return quantization_config(component, self.quantize[component], self.device, self.dtype)


# -------------------------------------------------------------------------------------------------- headers and tensors


def tensor_shapes(where: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors (name → file, from :func:`~unialignment.model.checkpoints.find_weights`), from headers alone.

    Raises:
        CheckpointError: A file is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(where.values())):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle isn't iterable
                if where.get(name) == path:
                    shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def read_tensors(where: Mapping[str, Path], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors, copied to memory; floating-point ones as ``dtype``, if given.

    Raises:
        CheckpointError: A file is damaged.
    """
    state: dict[str, Tensor] = {}
    for path in sorted(set(where.values())):
        with open_weights(path) as file:
            for name in (name for name, place in where.items() if place == path):
                value = file.get_tensor(name)
                # A copy: a tensor that stays mapped to its file would change, or crash, with the file.
                state[name] = value.to(dtype if value.is_floating_point() else None, copy=True)
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor], where: str, tied: Iterable[str] = ()) -> None:
    """Give a module on the meta device its tensors, all or nothing.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    check_names_and_shapes(module, {name: tuple(value.shape) for name, value in state.items()}, where, ignore=tied)
    module.load_state_dict(dict(state), strict=False, assign=True)


def check_class(folder: Path, names: tuple[str, ...], key: str = "_class_name") -> dict[str, Any]:
    """The config of a component, once it says that it is of a class we know.

    Raises:
        CheckpointError: The config is missing or names another class.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; the model is incomplete, get it again")
    config = read_json(folder / "config.json")
    found = config.get(key)
    classes = found if isinstance(found, list) else [found]
    if not any(name in names for name in classes):
        raise CheckpointError(
            f"{folder / 'config.json'} describes a {', '.join(map(str, classes))}; expected {' or '.join(names)}"
        )
    return config


# --------------------------------------------------------------------------------------------------------- transformer


def transformer_settings(folder: str | Path) -> dict[str, Any]:
    """Arguments of ``UniAlignmentTransformer`` for a folder of ours or a published one.

    Raises:
        CheckpointError: The folder is incomplete or of another architecture.
    """
    from unialignment.model.transformer import UniAlignmentTransformer

    folder = Path(folder)
    config = check_class(folder, ("UniAlignmentTransformer", PUBLISHED_CLASS))
    known = set(inspect.signature(UniAlignmentTransformer.__init__).parameters) - {"self"}
    # diffusers replaces the keys listed in "_use_default_values" by the class's defaults, which aren't those of the
    # class that wrote a published config. What the file says is what the weights need.
    settings = {key: value for key, value in config.items() if key in known}
    ignored = [key for key in config if key not in known and not key.startswith("_")]
    if ignored:
        logger.warning("%s: settings that mean nothing here are ignored: %s", folder, name_list(ignored))
    where = find_weights(folder)
    sizes = {"num_null_image_tokens": ("null_image_embd", 1), "vocab_size": ("text_proj_out.weight", 0)}
    missing = {key: place for key, place in sizes.items() if key not in settings and place[0] in where}
    # A published config doesn't say how many null-image tokens there are; the weights do.
    shapes = tensor_shapes({name: where[name] for name, _ in missing.values()})
    return {**settings, **{key: shapes[name][axis] for key, (name, axis) in missing.items()}}


def empty_transformer(settings: Mapping[str, Any], where: str | Path) -> UniAlignmentTransformer:
    """A transformer without memory, on the meta device.

    Raises:
        CheckpointError: The settings describe none.
    """
    from unialignment.model.transformer import UniAlignmentTransformer

    try:
        with torch.device("meta"):
            return UniAlignmentTransformer(**settings)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{Path(where) / 'config.json'} doesn't describe a transformer: {reason}") from error


def check_transformer(folder: str | Path) -> dict[str, Any]:
    """Compare a transformer folder's weights with its config, reading headers only.

    Returns:
        Its settings, see :func:`transformer_settings`.

    Raises:
        CheckpointError: Something is missing, damaged or of another architecture.
    """
    settings = transformer_settings(folder)
    shapes = tensor_shapes(needed(find_weights(folder)))
    check_names_and_shapes(empty_transformer(settings, folder), shapes, str(folder))
    return settings


def needed(where: Mapping[str, Path]) -> dict[str, Path]:
    """Without the published training-only projectors."""
    return {name: path for name, path in where.items() if not name.startswith(TRAINING_ONLY)}


def load_transformer(
    folder: str | Path, dtype: torch.dtype = torch.float32, quantization: Any = None
) -> UniAlignmentTransformer:
    """Load a published transformer folder (or one of ours).

    Args:
        folder: With ``config.json`` and safetensors, sharded or not.
        dtype: Of the result.
        quantization: diffusers' ``quantization_config``, if weights are to be quantized.

    Raises:
        CheckpointError: Something is missing, damaged or of another architecture.
    """
    from unialignment.model.transformer import UniAlignmentTransformer

    settings = check_transformer(folder)
    if quantization is not None:
        with _quantizing(folder):
            quantized = UniAlignmentTransformer.from_pretrained(
                folder, quantization_config=quantization, torch_dtype=dtype
            )
        return quantized.eval()
    model = empty_transformer(settings, folder)
    fill(model, read_tensors(needed(find_weights(folder)), dtype), str(folder))
    return model.eval()


@contextlib.contextmanager
def _quantizing(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except UniAlignmentError:
        raise
    except Exception as error:  # each backend raises its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"could not quantize the weights in {folder}: {reason}; leave quantize out") from error


# -------------------------------------------------------------------------------------- text encoder, tokenizer and VAE


def load_mask_embedding(folder: str | Path, width: int) -> Tensor:
    """The mask token's embedding ``[width]`` beside (or inside) a published pipeline's components.

    The file is a pickle; PyTorch's restricted unpickler builds tensors and plain containers only and refuses code.

    Raises:
        CheckpointError: There is none, or several that differ, or it holds anything but one vector of ``width``.
    """
    folder = Path(folder)
    places = (folder, folder / "transformer", folder / "text_encoder", folder / "tokenizer")
    paths = [path for place in places for path in sorted(place.glob(_MASK_FILES))]
    if not paths:
        raise CheckpointError(
            f"no {_MASK_FILES} in {folder}: the mask token's embedding is part of the published model and texts can't "
            "be written without it; download it too"
        )
    vectors = [_mask_vector(path, width) for path in paths]
    if any(not torch.equal(vector, vectors[0]) for vector in vectors):
        raise CheckpointError(f"{folder} has {len(paths)} mask embeddings that differ; keep the one of these weights")
    return vectors[0]


def _mask_vector(path: Path, width: int) -> Tensor:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch raise their own
        raise CheckpointError(
            f"{path} is damaged or holds more than a tensor, which may be code; refused, get it from its source again"
        ) from error
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if not isinstance(value, Tensor) or value.numel() != width or not value.is_floating_point():
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise CheckpointError(f"{path} must hold one vector of the text encoder's width {width}, got {found}")
    return value.detach().flatten().clone()


_TABLE, _TIED = "shared.weight", "encoder.embed_tokens.weight"
"""One table of token vectors under two names, of which a file may have either or both."""


def check_text_encoder(folder: Path, width: int) -> tuple[T5EncoderModel, dict[str, Path]]:
    """Compare a ``T5EncoderModel`` folder's weights with its config, reading headers only.

    Returns:
        The encoder on the meta device, and where its tensors lie.

    Raises:
        CheckpointError: Something is missing, damaged, of another architecture or of another width.
    """
    config = check_class(folder, ("T5EncoderModel", "T5ForConditionalGeneration"), "architectures")
    if config.get("model_type", "t5") != "t5":
        raise CheckpointError(f"{folder / 'config.json'} describes a {config['model_type']}; expected a T5 encoder")
    if config.get("d_model") != width:
        raise CheckpointError(
            f"the text encoder in {folder} is {config.get('d_model')} wide and the transformer expects {width}; they "
            "belong to two models"
        )
    try:
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config.from_dict(config))
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} doesn't describe a T5 encoder: {error}") from error
    where = {name: path for name, path in find_weights(folder).items() if not name.startswith(("decoder.", "lm_head."))}
    if _TABLE in where:
        where.pop(_TIED, None)
    check_names_and_shapes(encoder, tensor_shapes(where), str(folder), ignore=(_TABLE if _TIED in where else _TIED,))
    return encoder, where


def token_vector(where: Mapping[str, Path], token: int) -> Tensor:
    """One row ``[D]`` of a text encoder's table of token vectors, read alone.

    Args:
        where: From :func:`check_text_encoder`.
        token: Its id.

    Raises:
        CheckpointError: The table is shorter.
    """
    name = _TABLE if _TABLE in where else _TIED
    with open_weights(where[name]) as file:
        table = file.get_slice(name)
        if token >= table.get_shape()[0]:
            raise CheckpointError(f"{where[name]} has {table.get_shape()[0]} token vectors, the mask is token {token}")
        return table[token : token + 1][0].clone()


def load_text_encoder(
    folder: str | Path, width: int, dtype: torch.dtype = torch.float32, quantization: Any = None
) -> T5EncoderModel:
    """Load a ``T5EncoderModel`` folder, strictly.

    Args:
        folder: In ``transformers``' layout, safetensors only.
        width: What the transformer expects.
        dtype: Of the result.
        quantization: transformers' ``quantization_config``, if weights are to be quantized.

    Raises:
        CheckpointError: Something is missing, damaged, of another architecture or of another width.
    """
    folder = Path(folder)
    encoder, where = check_text_encoder(folder, width)
    if quantization is not None:
        with _quantizing(folder):
            return T5EncoderModel.from_pretrained(
                str(folder),
                quantization_config=quantization,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
            ).eval()
    state = read_tensors(where, dtype)
    if _TABLE not in state:
        state[_TABLE] = state.pop(_TIED)
    fill(encoder, state, str(folder), tied=(_TIED,))
    encoder.encoder.set_input_embeddings(encoder.shared)
    return encoder.eval()


def load_vae(folder: str | Path, channels: int) -> KLAutoencoder:
    """Load a diffusers ``AutoencoderKL`` folder, strictly, in float32.

    Args:
        folder: In diffusers' layout, safetensors only.
        channels: Latent channels that the transformer expects.

    Raises:
        CheckpointError: Something is missing, damaged, of another architecture or has other channels.
    """
    folder = Path(folder)
    autoencoder = check_vae(folder, channels)
    fill(autoencoder, read_tensors(find_weights(folder), torch.float32), str(folder))
    return KLAutoencoder(autoencoder).eval()


def check_vae(folder: Path, channels: int) -> AutoencoderKL:
    """Compare an ``AutoencoderKL`` folder's weights with its config, reading headers only.

    Returns:
        The autoencoder on the meta device.

    Raises:
        CheckpointError: Something is missing, damaged, of another architecture or has other channels.
    """
    config = check_class(folder, ("AutoencoderKL",))
    if config.get("latent_channels", 4) != channels:
        raise CheckpointError(
            f"the autoencoder in {folder} has {config.get('latent_channels', 4)} latent channels and the transformer "
            f"{channels}; they belong to two models"
        )
    try:
        with torch.device("meta"):
            autoencoder = AutoencoderKL.from_config(config)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} doesn't describe an AutoencoderKL: {error}") from error
    check_names_and_shapes(autoencoder, tensor_shapes(find_weights(folder)), str(folder))
    return autoencoder


def load_t5_tokenizer(folder: str | Path, vocab_size: int | None = None) -> TextTokenizer:
    """Load a T5 tokenizer folder; ``<extra_id_0>`` is the mask, and texts are laid out, as published.

    Args:
        folder: In ``transformers``' layout.
        vocab_size: Of the transformer's text head. A tokenizer without sentinels or mask token has its mask
            one past its last token, where the head has room for it.

    Raises:
        CheckpointError: It is missing, damaged, or has no padding token or no mask.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            backend = Tokenizer.from_file(str(path))
        elif (folder / "spiece.model").is_file():
            backend = T5TokenizerFast.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
        else:
            raise CheckpointError(f"no tokenizer.json in {folder}; the download is incomplete, repeat it")
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for damaged files
        raise CheckpointError(f"cannot load a tokenizer from {folder}: {error}") from error
    # Padding and truncation of whoever saved it last are stored too.
    backend.no_padding()
    backend.no_truncation()

    def token_id(role: str, default: str) -> int | None:
        token = config.get(role) or default
        return backend.token_to_id(str(token["content"] if isinstance(token, dict) else token))

    pad, end, mask = token_id("pad_token", "<pad>"), token_id("eos_token", "</s>"), backend.token_to_id("<extra_id_0>")
    size = backend.get_vocab_size(with_added_tokens=True)
    if mask is None and config.get("mask_token"):
        mask = token_id("mask_token", "")
    if mask is None and vocab_size is not None and vocab_size > size:
        mask = size
    if pad is None or mask is None:
        missing = "padding token" if pad is None else "<extra_id_0>, the mask"
        raise CheckpointError(f"the tokenizer in {folder} has no {missing}; expected a T5 tokenizer")
    head = max(size, vocab_size or 0, mask + 1)
    return TextTokenizer(backend, pad, mask, end, head, prompt_length=PROMPT_LENGTH, question_first=True)


def scheduler_shift(folder: str | Path, tokens: int) -> float:
    """The resolution shift of a flow-matching scheduler folder, for pictures of ``tokens`` image tokens.

    Raises:
        CheckpointError: It is missing or of another kind.
    """
    path = Path(folder) / "scheduler_config.json"
    config = read_json(path)
    if not str(config.get("_class_name")).startswith("FlowMatch"):
        raise CheckpointError(f"{path} names {config.get('_class_name')}; expected a flow-matching scheduler")
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    return math.exp(config.get("base_shift", 0.5) + slope * (tokens - low))


# ------------------------------------------------------------------------------------------------------- whole folders


def sampling_settings(shift: float) -> dict[str, dict[str, Any]]:
    """The published pipeline's sampler settings by task, with a scheduler's shift."""
    draw = {"num_inference_steps": 50, "guidance_scale": 7.0, "shift": shift}
    write = {"num_inference_steps": 64, "max_length": 128, "confidence_threshold": 1.0}
    drawing, writing = ("edit", "perceive", "control", "compose"), ("caption", "answer", "infill", "rewrite")
    return {
        "generate": {**draw, "num_inference_steps": 28},
        **{task: dict(draw) for task in drawing},
        **{task: dict(write) for task in writing},
    }


def assemble(
    folder: Path,
    transformer: UniAlignmentTransformer,
    encoder: T5EncoderModel,
    tokenizer: TextTokenizer,
    vae: KLAutoencoder,
    mask_embedding: Tensor | None,
) -> LoadedModel:
    """Put the parts of a pipeline together, with the published text conditioning.

    Raises:
        CheckpointError: They don't belong together.
    """
    config = transformer.config
    known = max(encoder.config.vocab_size, tokenizer.mask_token_id + 1)
    if not len(tokenizer) <= config.vocab_size <= known:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the transformer's text head {config.vocab_size} "
            f"and the text encoder {encoder.config.vocab_size}; they belong to different models"
        )
    embedder = T5TextEmbedder(encoder, tokenizer.mask_token_id, mask_embedding)
    shift = scheduler_shift(folder / "scheduler", (config.sample_size // config.patch_size) ** 2)
    return LoadedModel(
        {"transformer": transformer, "text_embedder": embedder.eval(), "autoencoder": vae, "tokenizer": tokenizer},
        {"name": folder.name, "sampling": sampling_settings(shift)},
    )


def load_published(folder: str | Path, options: LoadOptions | None = None) -> LoadedModel:
    """Load a published pipeline folder.

    Args:
        folder: See the module's description.
        options: How transformer and text encoder are loaded, in float32 unless given; the autoencoder is in float32.

    Raises:
        CheckpointError: Something is missing, damaged, unsafe, or doesn't belong with the rest; nothing is returned.
    """
    folder, chosen = Path(folder), options or LoadOptions()
    # What is cheap to check comes first: a wrong folder is refused before gigabytes are read.
    settings = check_transformer(folder / "transformer")
    tokenizer = load_t5_tokenizer(folder / "tokenizer", int(settings.get("vocab_size", 0)))
    width = int(settings.get("joint_attention_dim", 4096))
    mask_embedding = load_mask_embedding(folder, width)
    vae = load_vae(folder / "vae", int(settings.get("in_channels", 16)))

    def encoder() -> T5EncoderModel:
        return load_text_encoder(folder / "text_encoder", width, chosen.dtype, chosen.quantization("text_embedder"))

    def transformer() -> UniAlignmentTransformer:
        return load_transformer(folder / "transformer", chosen.dtype, chosen.quantization("transformer"))

    first = encoder()
    model = empty_transformer(settings, folder).eval() if chosen.lazy else transformer()
    loaded = assemble(folder, model, first, tokenizer, vae, mask_embedding)
    loaders = {
        "text_embedder": lambda: T5TextEmbedder(encoder(), tokenizer.mask_token_id, mask_embedding).eval(),
        "transformer": transformer,
    }
    return replace(loaded, loaders=loaders)


def load_t5_embedder(
    folder: str | Path, dtype: torch.dtype = torch.float32, quantization: Any = None
) -> T5TextEmbedder:
    """Load the text embedder of a model folder of ours that has a T5 encoder, strictly.

    Raises:
        CheckpointError: Something is missing, damaged or of another architecture.
    """
    folder = Path(folder)
    width = int(read_json(folder / "config.json").get("d_model") or 0)
    path = folder / "mask_embedding.safetensors"
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {folder}; the model is incomplete, get it again")
    with open_weights(path) as file:
        metadata = file.metadata() or {}
        if "mask_embedding" not in file.keys() or not metadata.get("mask_token_id", "").isdigit():  # noqa: SIM118
            raise CheckpointError(f"{path} holds no mask embedding with its token; get the model again")
        mask_embedding = file.get_tensor("mask_embedding").clone()
    encoder = load_text_encoder(folder, width, dtype, quantization)
    if tuple(mask_embedding.shape) != (width,):
        raise CheckpointError(f"{path} must hold one vector of {width}, got {list(mask_embedding.shape)}")
    visible = metadata.get("use_attention_mask") == "1"
    return T5TextEmbedder(encoder, int(metadata["mask_token_id"]), mask_embedding, visible).eval()
