"""Text to token ids and back, with a padding token that also ends a text and one mask token.

Wraps a ``tokenizers`` tokenizer: either a small BPE trained on the world's language, or a published one (T5). Knows
nothing of models, prompts or what the texts say.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from unialignment.errors import CheckpointError, InputError, StorageError

PAD, MASK, UNKNOWN = "[PAD]", "[MASK]", "[UNK]"
_SPACE = "▁"  # the metaspace: a word carries the space before it, which makes decoding exact
_WORD_WEIGHT = 500
_PRINTABLE = [chr(code) for code in range(33, 127) if not chr(code).isupper()]


def _normalizer() -> Any:
    return normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[‘’]"), "'"),
            normalizers.Replace(Regex("[“”]"), '"'),
            normalizers.Replace(Regex("[‐‑‒–—−]"), "-"),
            # Control characters (but not white space) carry nothing and would each become an unknown.
            normalizers.Replace(Regex(r"[\x00-\x08\x0e-\x1f\x7f\u200b-\u200f\ufeff\ufe0f]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


_NORMALIZER = _normalizer()


def normalise(text: str) -> str:
    """The text as the world's tokenizer sees it: lower case, no accents, plain quotes and dashes, single spaces.

    ``decode(encode(text))`` gives exactly this for text in printable ASCII.
    """
    return str(_NORMALIZER.normalize_str(text))


class TextTokenizer:
    """Token ids of texts.

    Args:
        backend: The underlying tokenizer.
        pad_token_id: Fills a batch and ends a text.
        mask_token_id: The absorbing state of masked diffusion. May be one past the backend's vocabulary.
        eos_token_id: A token that also ends a text (T5's ``</s>``), if any.
        vocab_size: Number of ids that a model has to know, the mask included; from the backend when ``None``.
        prompt_length: Condition texts are padded to this many tokens, all of which the model sees (256 in Stable
            Diffusion 3 and the published model). ``None``: one visible end token, masked padding.
        question_first: A question is the beginning of the text that is written, as in the published model, rather than
            a condition beside it.
    """

    def __init__(
        self,
        backend: Tokenizer,
        pad_token_id: int = 0,
        mask_token_id: int = 1,
        eos_token_id: int | None = None,
        vocab_size: int | None = None,
        prompt_length: int | None = None,
        question_first: bool = False,
    ) -> None:
        self._backend = backend
        # A user's literal "[MASK]" or "[PAD]" in a prompt is text, not a command.
        self._backend.encode_special_tokens = True
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.vocab_size = vocab_size or max(backend.get_vocab_size(with_added_tokens=True), mask_token_id + 1)
        self.prompt_length = prompt_length
        self.question_first = question_first

    def __len__(self) -> int:
        return self.vocab_size

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 1024, words: Sequence[str] = (), min_frequency: int = 2
    ) -> TextTokenizer:
        """Train a lower-case BPE with white-space words.

        Args:
            texts: Corpus; read once.
            vocab_size: Largest number of tokens, special ones included.
            words: Names or phrases of which every word has to be a single token (class names).
            min_frequency: Pairs seen less often are not merged.

        Returns:
            The tokenizer; ids 0, 1, 2 are padding, mask and unknown.

        Raises:
            InputError: The vocabulary is too small for ``words``.
        """
        backend = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
        backend.normalizer = _normalizer()
        # Punctuation is split off after the metaspace has been attached, so "dog", "dog," and "dog." share one token.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"), pre_tokenizers.Punctuation()]
        )
        backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[PAD, MASK, UNKNOWN],
            initial_alphabet=[_SPACE, *_PRINTABLE],
            show_progress=False,
        )

        def corpus() -> Iterator[str]:
            yield from texts
            for phrase in words:  # outweighing the corpus, so that their merges come first
                yield " ".join([phrase] * _WORD_WEIGHT)

        backend.train_from_iterator(corpus(), trainer=trainer)
        tokenizer = cls(backend)
        split = [word for word in words if not tokenizer.is_whole(word)]
        if split:
            raise InputError(
                f"a vocabulary of {vocab_size} tokens cannot hold every required word whole: {len(split)} are split, "
                f"such as {split[0]!r}; raise vocab_size"
            )
        return tokenizer

    @classmethod
    def from_transformers(cls, tokenizer: Any, mask_token_id: int | None = None) -> TextTokenizer:
        """Wrap a fast ``transformers`` tokenizer such as T5's.

        Args:
            tokenizer: A ``PreTrainedTokenizerFast``.
            mask_token_id: The mask; by default ``<extra_id_0>`` (the published choice, 32099 in T5) and, where there is
                none, one past the tokenizer's last id.

        Raises:
            InputError: No fast backend or no padding token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or tokenizer.pad_token_id is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no fast backend or no padding token; load it with "
                "AutoTokenizer.from_pretrained(folder, use_fast=True)"
            )
        size = len(tokenizer)
        sentinel = backend.token_to_id("<extra_id_0>")
        mask = mask_token_id if mask_token_id is not None else size if sentinel is None else int(sentinel)
        return cls(
            Tokenizer.from_str(backend.to_str()),
            pad_token_id=int(tokenizer.pad_token_id),
            mask_token_id=mask,
            eos_token_id=tokenizer.eos_token_id,
            vocab_size=max(size, mask + 1),
        )

    def is_whole(self, text: str) -> bool:
        """Whether every word (and punctuation mark) of ``text`` is a single token."""
        words = self._backend.pre_tokenizer.pre_tokenize_str(self._backend.normalizer.normalize_str(text))
        return len(self._backend.encode(text, add_special_tokens=False).ids) == len(words)

    def encode(
        self, texts: Sequence[str], length: int | None = None, *, truncate: bool = False, gaps: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Token ids of a batch of texts.

        Args:
            texts: Any texts; see ``normalise``. Unknown characters become one unknown token per run.
            length: Width of the result; the longest text when ``None`` (at least 1).
            truncate: Cut texts that are too long instead of refusing them.
            gaps: Read ``[MASK]`` in a text as the mask token (``infill``). Otherwise it is ordinary text.

        Returns:
            ``ids [B, L]`` (int64, padded) and ``mask [B, L]`` (bool, true at real tokens).

        Raises:
            InputError: Not texts, or a text longer than ``length`` and ``truncate`` is false.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("encode expects a list of strings; wrap a single text in a list")
        rows = [self._ids(text, gaps) for text in texts]
        longest = max((len(row) for row in rows), default=0)
        width = max(longest, 1) if length is None else length
        if longest > width and not truncate:
            worst = max(range(len(rows)), key=lambda index: len(rows[index]))
            raise InputError(
                f"text {worst} has {longest} tokens ({texts[worst][:40]!r}…), the limit is {width}; shorten it or "
                "allow truncation"
            )
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for row, tokens in enumerate(rows):
            tokens = tokens[:width]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = True
        return ids, mask

    def _ids(self, text: str, gaps: bool) -> list[int]:
        if not gaps:
            return list(self._backend.encode(text).ids)
        ids: list[int] = []
        for index, part in enumerate(text.split(MASK)):
            tokens = list(self._backend.encode(part.strip(), add_special_tokens=False).ids) if part.strip() else []
            if index:
                ids.append(self.mask_token_id)
                if tokens and not part[0].isspace() and self._backend.id_to_token(tokens[0]) == _SPACE:
                    tokens = tokens[1:]  # "[MASK]." is a gap and a full stop, as a masked "dog." would be
            ids.extend(tokens)
        return ids + ([] if self.eos_token_id is None else [self.eos_token_id])

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of a batch of ids ``[B, L]``; each ends at its first padding (or end) token. Masks show as ``[MASK]``.

        Unknown tokens are dropped.
        """
        ends = {self.pad_token_id, self.eos_token_id}
        texts = []
        for row in ids.tolist() if isinstance(ids, Tensor) else ids:
            parts: list[list[int]] = [[]]
            for token in row:
                if token in ends:
                    break
                if token == self.mask_token_id:
                    parts.append([])
                else:
                    parts[-1].append(token)
            text = self._words(parts[0])
            for part in parts[1:]:
                glue = " " if part and (self._backend.id_to_token(part[0]) or "").startswith(_SPACE) else ""
                text += f" {MASK}{glue}{self._words(part)}"
            texts.append(text.strip())
        return texts

    def _words(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True)).strip() if ids else ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition; changes whenever any text could be tokenized differently."""
        settings = (self.pad_token_id, self.mask_token_id, self.eos_token_id, self.vocab_size, *self._layout().items())
        return hashlib.sha256((self._backend.to_str() + repr(settings)).encode()).hexdigest()

    def _layout(self) -> dict[str, Any]:
        """How texts are laid out, as far as it isn't our own way."""
        layout = {"prompt_length": self.prompt_length, "question_first": self.question_first}
        return {name: value for name, value in layout.items() if value}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``.

        Raises:
            StorageError: The folder cannot be written; no file is left half-written.
        """
        settings = {
            "pad_token_id": self.pad_token_id,
            "mask_token_id": self.mask_token_id,
            "eos_token_id": self.eos_token_id,
            "vocab_size": self.vocab_size,
            **self._layout(),
        }
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            _write(Path(folder) / "tokenizer.json", self._backend.to_str(pretty=False))
            _write(Path(folder) / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write the tokenizer to {folder}: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Load what ``save_pretrained`` wrote.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        path = Path(folder)
        try:
            settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
            return cls(Tokenizer.from_str((path / "tokenizer.json").read_text("utf-8")), **settings)
        except Exception as error:  # tokenizers raises bare Exception for damaged files
            raise CheckpointError(f"cannot load a tokenizer from {folder}: {error}") from error


def encode_conditions(tokenizer: TextTokenizer, texts: Sequence[str], bucket: int = 1) -> tuple[Tensor, Tensor]:
    """Condition texts to ids and mask, each text followed by one visible end token.

    The end token gives an empty prompt a token to be seen by, and marks where a prompt is complete. With the
    tokenizer's ``prompt_length``, texts are padded to that, all of it visible.

    Args:
        tokenizer: The tokenizer.
        texts: Condition texts.
        bucket: Pad the length to a multiple of this.

    Returns:
        ids ``[B, L]`` and bool mask ``[B, L]``.

    Raises:
        InputError: A text is longer than the tokenizer's ``prompt_length``.
    """
    if tokenizer.prompt_length is not None:
        ids, mask = tokenizer.encode(list(texts), tokenizer.prompt_length)
        return ids, torch.ones_like(mask)
    if any(texts):
        ids, mask = tokenizer.encode(list(texts))
    else:
        ids, mask = torch.zeros(len(texts), 0, dtype=torch.long), torch.zeros(len(texts), 0, dtype=torch.bool)
    length = -(-(ids.shape[1] + 1) // bucket) * bucket
    padded = torch.full((len(texts), length), tokenizer.pad_token_id, dtype=torch.long)
    padded[:, : ids.shape[1]] = torch.where(mask, ids, tokenizer.pad_token_id)
    visible = torch.arange(length).unsqueeze(0) <= mask.sum(1, keepdim=True)
    return padded, visible


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
