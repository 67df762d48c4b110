"""Text embedders: token ids to the vectors that enter the transformer.

A learned table (trained with the model) or a frozen T5 encoder with the extra mask-token embedding. Knows nothing of
tokenization, prompts or diffusion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from unialignment.errors import CheckpointError, InputError

_MASK_FILE = "mask_embedding.safetensors"


class TextEmbedder(Protocol):
    """What the rest of the package relies on."""

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""

    def embed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids ``[B, L]`` (and which of them are real) to vectors ``[B, L, D]``."""


def _check_ids(ids: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point():
        raise InputError(f"token ids must be an integer tensor [B, L], got {ids.dtype} {list(ids.shape)}")


class TokenEmbedder(ModelMixin, ConfigMixin):
    """A learned table of token vectors plus learned positions.

    Args:
        vocab_size: Number of token ids.
        embedding_dim: Width of a vector.
        max_length: Longest text.
        init_std: Standard deviation of the initial vectors; of the same order as what the transformer's residual
            stream gathers, so that word identity is not drowned in the first blocks.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, vocab_size: int, embedding_dim: int, max_length: int = 256, init_std: float = 0.25) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, embedding_dim)
        self.positions = nn.Parameter(torch.empty(max_length, embedding_dim))
        nn.init.normal_(self.table.weight, std=init_std)
        nn.init.normal_(self.positions, std=init_std / 2)

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return int(self.table.embedding_dim)

    @property
    def max_length(self) -> int:
        """Longest text."""
        return int(self.positions.shape[0])

    def extend(self, max_length: int) -> None:
        """Makes room for longer texts. What shorter ones give stays; new positions begin as the last one there was.

        Raises:
            InputError: less than there is.
        """
        if max_length < self.max_length:
            raise InputError(f"max_length={max_length}: the embedder has {self.max_length} positions already")
        missing = max_length - self.max_length
        with torch.no_grad():
            positions = torch.cat([self.positions, self.positions[-1:].expand(missing, -1)])
        self.positions = nn.Parameter(positions, requires_grad=self.positions.requires_grad)
        self.register_to_config(max_length=max_length)

    def embed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids ``[B, L]`` to vectors ``[B, L, D]``. ``mask`` is not needed here: tokens do not mix.

        Raises:
            InputError: Not integer ids of two dimensions, or longer than ``max_length``.
        """
        _check_ids(ids)
        if ids.shape[1] > self.max_length:
            raise InputError(
                f"text of {ids.shape[1]} tokens, the embedder knows {self.max_length} positions; shorten it"
            )
        return cast(Tensor, self.table(ids) + self.positions[: ids.shape[1]])

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same as ``embed``, for wrappers that hook ``forward``."""
        return self.embed(ids, mask)


class T5TextEmbedder(nn.Module):
    """A frozen T5 encoder in which the mask token's input embedding is a vector of its own.

    The published model takes ``<extra_id_0>`` (32099) as mask token and replaces its row by a trained vector, kept in a
    separate file; padding is not masked out of attention (arXiv 2501.00289 and its released code).

    Args:
        encoder: The encoder; frozen and put into evaluation mode here.
        mask_token_id: Id whose embedding is replaced; may lie beyond the encoder's vocabulary.
        mask_embedding: The replacement ``[D]``; the encoder's own row when ``None``.
        use_attention_mask: Keep padding out of attention (not the published form).
    """

    mask_embedding: Tensor

    def __init__(
        self,
        encoder: T5EncoderModel,
        mask_token_id: int,
        mask_embedding: Tensor | None = None,
        use_attention_mask: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.mask_token_id = mask_token_id
        self.use_attention_mask = use_attention_mask
        rows = encoder.get_input_embeddings().weight
        if mask_embedding is None:
            if mask_token_id >= len(rows):
                raise InputError(
                    f"mask token {mask_token_id} lies beyond the encoder's {len(rows)} tokens; give its mask_embedding"
                )
            mask_embedding = rows[mask_token_id]
        if mask_embedding.shape != rows.shape[1:]:
            raise InputError(f"mask_embedding must be [{rows.shape[1]}], got {list(mask_embedding.shape)}")
        self.register_buffer("mask_embedding", mask_embedding.detach().to(rows).clone())

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return int(self.encoder.config.d_model)

    def train(self, mode: bool = True) -> T5TextEmbedder:
        """Stays in evaluation mode: the encoder is frozen and its dropout must not wake up in a training loop."""
        return super().train(False)

    @torch.no_grad()
    def embed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids ``[B, L]`` to contextual vectors ``[B, L, D]``.

        Args:
            ids: Token ids.
            mask: ``[B, L]``, true at real tokens; used only with ``use_attention_mask``.

        Raises:
            InputError: Not integer ids of two dimensions, or ids beyond the vocabulary.
        """
        _check_ids(ids)
        if not ids.shape[1]:
            return self.mask_embedding.new_zeros(*ids.shape, self.embedding_dim)
        table = self.encoder.get_input_embeddings()
        masked = ids == self.mask_token_id
        rest = ids.masked_fill(masked, 0)
        if rest.numel() and (int(rest.max()) >= table.num_embeddings or int(rest.min()) < 0):
            raise InputError(f"token id {int(rest.max())} beyond the encoder's {table.num_embeddings} tokens")
        vectors = torch.where(masked[..., None], self.mask_embedding, table(rest))
        attention = mask.to(vectors.dtype) if self.use_attention_mask and mask is not None else None
        output = self.encoder(inputs_embeds=vectors, attention_mask=attention)
        return cast(Tensor, output.last_hidden_state)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same as ``embed``, for wrappers that hook ``forward``."""
        return self.embed(ids, mask)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the encoder in ``transformers``' layout, and the mask embedding beside it."""
        self.encoder.save_pretrained(folder, **options)
        metadata = {"mask_token_id": str(self.mask_token_id), "use_attention_mask": str(int(self.use_attention_mask))}
        save_file({"mask_embedding": self.mask_embedding.contiguous()}, str(Path(folder) / _MASK_FILE), metadata)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mask_token_id: int | None = None,
        mask_embedding: Tensor | None = None,
        **options: Any,
    ) -> T5TextEmbedder:
        """Load a T5 encoder folder, with its mask embedding when it has one.

        Args:
            folder: Local folder.
            mask_token_id: Needed for a plain T5 folder; 32099 for the published model.
            mask_embedding: ``[D]``, for a plain T5 folder.
            options: Passed to ``T5EncoderModel.from_pretrained``.

        Raises:
            CheckpointError: The folder cannot be loaded or does not say which token is the mask.
        """
        try:
            encoder = T5EncoderModel.from_pretrained(str(folder), use_safetensors=True, **options)
            path = Path(folder) / _MASK_FILE
            metadata: dict[str, str] = {}
            if path.exists():
                with safe_open(str(path), framework="pt") as file:
                    metadata = file.metadata() or {}
                mask_embedding = load_file(str(path))["mask_embedding"] if mask_embedding is None else mask_embedding
                mask_token_id = int(metadata["mask_token_id"]) if mask_token_id is None else mask_token_id
        except Exception as error:  # safetensors and transformers raise various types for damaged files
            raise CheckpointError(f"cannot load a T5 text embedder from {folder}: {error}") from error
        if mask_token_id is None:
            raise CheckpointError(
                f"{folder} has no {_MASK_FILE}: say which token is the mask, e.g. mask_token_id=32099 (<extra_id_0>)"
            )
        return cls(encoder, mask_token_id, mask_embedding, metadata.get("use_attention_mask") == "1")


def load_text_embedder(folder: str | Path, **options: Any) -> TokenEmbedder | T5TextEmbedder:
    """Load whichever text embedder a folder holds, by the class named in its ``config.json``.

    Raises:
        CheckpointError: Missing, unreadable or of an unknown class.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        names = {config.get("_class_name"), *(config.get("architectures") or ())}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} holds no text embedder: cannot read {path} ({error})") from error
    if "TokenEmbedder" in names:
        try:
            return cast(
                TokenEmbedder, TokenEmbedder.from_pretrained(str(folder), use_safetensors=True, **options).eval()
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot load TokenEmbedder from {folder}: {error}") from error
    if any(name and name.startswith("T5") for name in names):
        return T5TextEmbedder.from_pretrained(folder, **options)
    raise CheckpointError(
        f"{path} names no known text embedder ({sorted(filter(None, names))}); expected TokenEmbedder or T5"
    )
