"""Where a pipeline's weights are: on which device, offloaded, dropped, quantized, adapted by LoRAs.

:class:`Placement` is the part of the pipeline that moves weights; results don't depend on it. Knows nothing of tasks.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from unialignment.errors import InputError
from unialignment.model.blocks import forget_fused
from unialignment.model.lora import LoraReport, adapter_names, load_lora
from unialignment.model.quantization import is_quantized, refuse_quantized
from unialignment.model.text import T5TextEmbedder
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.offloading import (
    Offload,
    accelerator,
    group_offload,
    model_offload,
    sequential_offload,
    usable_device,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REMEMBERED = 64
"""Texts whose embeddings are kept while the text encoder is dropped."""


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA file in use: where it came from, how strong it is, and what became of its keys."""

    path: Path
    scale: float
    report: LoraReport


class Placement:
    """Moves the weights of ``transformer``, ``text_embedder`` and ``autoencoder``; mixed into the pipeline."""

    autoencoder: Any
    batch_limit: int | None = None
    """Most samples computed at once where a call says nothing; ``None``: by the number of tokens."""

    def _place(self, transformer: UniAlignmentTransformer, text_embedder: Any) -> None:
        self._transformer = transformer.eval()
        self._text_embedder = text_embedder.eval()
        self._loaders: dict[str, Callable[[], Any]] = {}
        self._offload: Offload | None = None
        self._drops = self._alternates = False
        self._remembered: dict[str, Tensor] = {}
        self._target: torch.device | None = None  # where components without weights belong
        self._dtype: torch.dtype | None = None
        self.loras: dict[str, LoadedLora] = {}

    # ------------------------------------------------------------------------------------------------- components

    @property
    def transformer(self) -> UniAlignmentTransformer:
        """The model; its weights are loaded now, if they weren't."""
        if _is_empty(self._transformer):
            fresh = self._load("transformer")
            self._transformer = fresh
            for name, lora in self.loras.items():
                load_lora(fresh, lora.path, lora.scale, name)
            self._set_scales()
        return self._transformer

    @transformer.setter
    def transformer(self, module: UniAlignmentTransformer) -> None:
        self._transformer = module

    @property
    def text_embedder(self) -> Any:
        """Token ids to vectors; loaded again, if it was dropped."""
        if _is_empty(self._text_embedder):
            if self._alternates and "transformer" in self._loaders and not _is_empty(self._transformer):
                self._target, self._dtype = self.device, self.dtype
                _empty(self._transformer)
                _free()
            self._text_embedder = self._load("text_embedder")
        return self._text_embedder

    @text_embedder.setter
    def text_embedder(self, module: Any) -> None:
        self._text_embedder = module
        self._remembered.clear()

    def _load(self, name: str) -> Any:
        loader = self._loaders.get(name)
        if loader is None:
            raise InputError(
                f"the {name} was dropped and this pipeline wasn't loaded from a folder, so it can't come back; load "
                "the model again"
            )
        return _to(loader().eval(), self._target, self._dtype)

    @property
    def device(self) -> torch.device:
        """Where computing is done."""
        if self._offload is not None:
            return self._offload.device
        if _is_empty(self._transformer) and self._target is not None:
            return self._target
        return next(self._transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the transformer."""
        if _is_empty(self._transformer) and self._dtype is not None:
            return self._dtype
        return next(self._transformer.parameters()).dtype

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """Move to a device and/or change the arithmetic of transformer and text embedder; returns the pipeline.

        Raises:
            InputError: The device or dtype can't be had, or weights are offloaded or quantized.
        """
        target = None if device is None else resolve_device(device)
        arithmetic = None if dtype is None else resolve_dtype(dtype)
        self._check_plain("to()")
        if arithmetic not in (None, self.dtype):
            for module in (self._transformer, self._text_embedder):
                refuse_quantized(module, "another dtype")
        self._target, self._dtype = target or self.device, arithmetic or self.dtype
        for module in (self._transformer, self._text_embedder):
            if not _is_empty(module):
                _to(module, target, arithmetic)
        if target is not None:
            self.autoencoder.to(target)
        self._remembered.clear()
        return self

    def _check_plain(self, what: str) -> None:
        if self._offload is not None:
            raise InputError(
                f"{what} while weights are offloaded ({self._offload.kind}); call disable_offload() before it"
            )

    def _components(self) -> dict[str, nn.Module]:
        return {
            "transformer": self.transformer,
            "text_embedder": self.text_embedder,
            "autoencoder": self.autoencoder,
        }

    # ------------------------------------------------------------------------------------------- the text encoder

    def drop_text_encoder(self, enabled: bool = True, *, alternate: bool = False, now: bool = True) -> None:
        """Free the text encoder's memory whenever prompts are encoded; it is loaded again for new ones.

        Pictures need it before the first step only. Texts need it at every step, so it is freed after the last. The
        embeddings of recent prompts are kept.

        Args:
            enabled: ``False``: keep it from now on.
            alternate: Free the transformer too while new prompts are encoded, so that the two are never there together.
                Texts, which need both, are then refused.
            now: Free it now, and not only after its next use.

        Raises:
            InputError: There is no such encoder (the token table of models trained here is needed throughout), no
                folder to load it from again, or weights are offloaded.
        """
        if not enabled:
            self._drops = self._alternates = False
            _ = self.text_embedder
            return
        self._check_plain("drop_text_encoder()")
        if not isinstance(self._text_embedder, T5TextEmbedder):
            raise InputError("this model embeds texts by a small table that every step needs; there is none to drop")
        for name in ("text_embedder", "transformer") if alternate else ("text_embedder",):
            if name not in self._loaders:
                raise InputError(
                    f"dropping the {name} needs the folder it can be loaded from again, and this pipeline wasn't "
                    "loaded from one; use unialignment.load(folder)"
                )
        self._target, self._dtype = self.device, self.dtype
        self._drops, self._alternates = True, alternate
        if now:
            self._release_text_encoder()

    def _release_text_encoder(self) -> None:
        if self._drops and not _is_empty(self._text_embedder):
            _empty(self._text_embedder)
            _free()

    def encode_ahead(self, texts: Sequence[str]) -> None:
        """Embed prompts now, if the text encoder is dropped afterwards; else nothing is done."""
        if not self._drops:
            return
        wanted = list(dict.fromkeys(texts))
        kept = {text: self._remembered.pop(text) for text in wanted if text in self._remembered}
        room = max(0, REMEMBERED - len(wanted))
        older = list(self._remembered.items())
        self._remembered = {**dict(older[len(older) - room :] if room else []), **kept}
        new = [text for text in wanted if text not in kept]
        if new:
            for text in new:  # one by one: the least memory, and no text's padding depends on another's
                self._remembered[text] = self._embed_texts([text])[0][0]
            self._release_text_encoder()

    def _embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors ``[B, L, D]`` and mask ``[B, L]`` of condition texts."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- offloading

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Keep one component on the accelerator at a time, the others on the CPU, as in diffusers.

        Args:
            device: The accelerator; the one there is unless given.

        Raises:
            InputError: There is none, or the text encoder is being dropped.
        """
        target = accelerator(device, "model offload")
        self._start_offload(lambda: model_offload(self._components(), target))

    def enable_sequential_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Keep one layer, and of the transformer one block, on the accelerator at a time: least memory, slow.

        Args:
            device: The accelerator; the one there is unless given.

        Raises:
            InputError: There is none, weights are quantized, or the text encoder is being dropped.
        """
        target = accelerator(device, "sequential offload")
        for module in (self._transformer, self._text_embedder):
            refuse_quantized(module, "sequential offload")
        self._start_offload(lambda: sequential_offload(self._components(), target))

    def enable_group_offload(
        self,
        onload_device: str | torch.device | None = None,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int = 1,
        use_stream: bool = False,
        offload_to_disk_path: str | Path | None = None,
        exclude_modules: Sequence[str] = (),
    ) -> None:
        """Keep one group of blocks on the accelerator at a time, as in diffusers.

        Args:
            onload_device: The accelerator; the one there is unless given.
            offload_device: Where the others wait.
            offload_type: ``"block_level"`` or ``"leaf_level"``. The transformer goes by blocks in either, a T5 encoder
                by layers.
            num_blocks_per_group: Blocks that come together.
            use_stream: Fetch the next group while one computes (CUDA only).
            offload_to_disk_path: Folder for weights that wait on disk instead of in memory.
            exclude_modules: Components that stay on the device.

        Raises:
            InputError: There is no accelerator, an argument is unusable, or the text encoder is being dropped.
        """
        target = accelerator(onload_device, "group offload")
        if offload_type not in ("block_level", "leaf_level"):
            raise InputError(f"offload_type must be block_level or leaf_level, got {offload_type!r}")
        if num_blocks_per_group < 1:
            raise InputError(f"num_blocks_per_group must be at least 1, got {num_blocks_per_group}")
        if use_stream and target.type != "cuda":
            raise InputError(f"use_stream needs CUDA, and the device is {target}; leave it out")
        unknown = set(exclude_modules) - {"transformer", "text_embedder", "autoencoder"}
        if unknown:
            raise InputError(f"exclude_modules: no component {', '.join(sorted(unknown))} in this pipeline")
        if offload_to_disk_path is not None:
            for module in (self._transformer, self._text_embedder):
                refuse_quantized(module, "waiting on disk")
        self._start_offload(
            lambda: group_offload(
                self._components(),
                target,
                offload_device=accelerator(offload_device, "group offload"),
                offload_type=offload_type,
                num_blocks_per_group=num_blocks_per_group,
                use_stream=use_stream,
                offload_to_disk_path=offload_to_disk_path,
                exclude=tuple(exclude_modules),
            )
        )

    def _start_offload(self, start: Callable[[], Offload]) -> None:
        if self._drops:
            raise InputError("offloading and drop_text_encoder exclude each other; drop_text_encoder(False) before it")
        self.disable_offload()
        forget_fused(self.transformer)
        self._offload = start()

    def disable_offload(self) -> None:
        """Take all offloading hooks away; weights are then on the CPU, ``to(device)`` moves them on."""
        if self._offload is not None:
            self._offload.remove()
            self._offload = None

    @contextlib.contextmanager
    def _without_offload(self) -> Iterator[None]:
        """Hooks hold on to layers; while these change, there must be none."""
        offload = self._offload
        self.disable_offload()
        try:
            yield
        finally:
            if offload is not None:
                self._offload = offload.again()

    def _rest(self) -> None:
        """At the end of a call: free what isn't needed until the next."""
        if self._offload is not None:
            self._offload.rest()
        self._release_text_encoder()

    # ------------------------------------------------------------------------------------------------- autoencoder

    def enable_vae_slicing(self) -> None:
        """Encode and decode pictures one by one (diffusers' own).

        Raises:
            InputError: The autoencoder isn't an ``AutoencoderKL``.
        """
        self._vae("enable_slicing")()

    def enable_vae_tiling(self, tile: int | None = None) -> None:
        """Encode and decode tile by tile (diffusers' own); at their seams pictures differ a little.

        Args:
            tile: Side of a tile in pixels; the autoencoder's own unless given.

        Raises:
            InputError: The autoencoder isn't an ``AutoencoderKL``, or the tile is unusable.
        """
        enable = self._vae("enable_tiling")
        enable() if tile is None else enable(tile)

    def disable_vae_slicing(self) -> None:
        """Undo :meth:`enable_vae_slicing`."""
        self._vae("disable_slicing")()

    def disable_vae_tiling(self) -> None:
        """Undo :meth:`enable_vae_tiling`."""
        self._vae("disable_tiling")()

    def _vae(self, method: str) -> Any:
        if not hasattr(self.autoencoder, method):
            raise InputError(
                f"tiling and slicing are AutoencoderKL's; this model has a {type(self.autoencoder).__name__}, which "
                "needs little memory"
            )
        return getattr(self.autoencoder, method)

    # -------------------------------------------------------------------------------------------------------- LoRA

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str = "default") -> LoraReport:
        """Add a LoRA file's change to the transformer; several may be in use at once.

        Args:
            path: A ``.safetensors`` file in diffusers' or kohya's form, or a folder with one.
            scale: Strength; 1 is as trained.
            name: Of the adapter, to tell several apart.

        Returns:
            The layers that it changes, and every key that found no place, with the reason.

        Raises:
            CheckpointError: The file is unusable; the model is then as before.
            InputError: The name is taken, the scale isn't a number, or weights are quantized.
        """
        _check_scale(scale)
        refuse_quantized(self._transformer, "a LoRA")
        with self._without_offload():
            report = load_lora(self.transformer, path, scale, name)
            self.loras[name] = LoadedLora(Path(path), float(scale), report)
            self._set_scales()
        return report

    def set_lora_scale(self, scale: float, name: str = "default") -> None:
        """Change the strength of a LoRA in use.

        Raises:
            InputError: There is none of that name, or the scale isn't a number.
        """
        _check_scale(scale)
        self._lora(name)
        found = self.loras[name]
        self.loras[name] = LoadedLora(found.path, float(scale), found.report)
        self._set_scales()

    def _set_scales(self) -> None:
        if self.loras:
            self.transformer.set_adapters(list(self.loras), weights=[lora.scale for lora in self.loras.values()])
            self.transformer.eval()

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA away, or all of them: the model is as before.

        Raises:
            InputError: There is none of that name.
        """
        if name is not None:
            self._lora(name)
        with self._without_offload():
            if name is None or set(self.loras) == {name}:
                transformer = self.transformer
                self.loras.clear()
                if adapter_names(transformer):
                    transformer.unload_lora()
            else:
                self.transformer.delete_adapters(name)
                del self.loras[name]
                self._set_scales()

    def _lora(self, name: str) -> None:
        if name not in self.loras:
            raise InputError(f"no LoRA {name!r} is loaded; there are: {', '.join(self.loras) or 'none'}")


# ------------------------------------------------------------------------------------------------------------- details


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A usable device; the best there is for ``None`` and ``"auto"``.

    Raises:
        InputError: It can't be used here.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return usable_device(device)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """An arithmetic by name; float32 for ``None``.

    Raises:
        InputError: It is another.
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None:
        return torch.float32
    if dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)) or not abs(scale) < float("inf"):
        raise InputError(f"the scale of a LoRA must be a number, got {scale!r}")


def _to(module: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    if is_quantized(module):
        dtype = None
    # Not their own `to`: diffusers' warns of float32 modules even where there are none.
    return nn.Module.to(module, device=device, dtype=dtype) if device or dtype else module


def _is_empty(module: nn.Module) -> bool:
    """Whether a module has been left without weights."""
    parameter = next(module.parameters(), None)
    return parameter is not None and parameter.device.type == "meta" and not hasattr(module, "_hf_hook")


def _empty(module: nn.Module) -> None:
    """Leave a module without weights; its settings stay."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                part._parameters[name] = nn.Parameter(bare, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    forget_fused(module)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
