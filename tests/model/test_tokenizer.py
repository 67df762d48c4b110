"""Tokenizer: exact decoding, whole words, padding that ends a text, and users' special strings as plain text."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from unialignment.errors import CheckpointError, InputError, StorageError
from unialignment.model.tokenizer import TextTokenizer, normalise
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.stream import all_language

CORPUS = [
    "A large flat red apple, left of the shaded dog.",
    "How many crocodiles are there? Two; one is small!",
    "Put the t-shirt (from image 2) on a blue background: it's 'new'.",
] * 5
NAMES = ["red apple", "crocodile", "t-shirt", "jack-o-lantern"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, 512, words=NAMES)


def test_special_ids(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 1)
    assert 3 < tokenizer.vocab_size <= 512 and len(tokenizer) == tokenizer.vocab_size


@pytest.mark.parametrize("text", CORPUS[:3])
def test_world_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    ids, _ = tokenizer.encode([text])
    assert tokenizer.decode(ids) == [text.lower()]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=string.printable, max_size=60))
def test_printable_text_comes_back_normalised(tokenizer: TextTokenizer, text: str) -> None:
    ids, mask = tokenizer.encode([text])
    assert tokenizer.decode(ids) == [normalise(text)]
    assert int(ids.max()) < tokenizer.vocab_size and 2 not in ids.tolist()[0]
    assert mask.sum() == (ids != 0).sum()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_unicode_is_survived(tokenizer: TextTokenizer, text: str) -> None:
    ids, _ = tokenizer.encode([text], length=200)
    assert isinstance(tokenizer.decode(ids)[0], str) and normalise(normalise(text)) == normalise(text)


def test_the_language_of_the_nano_world() -> None:
    """Class names are whole, unseen texts come back exactly and nearly every word is one token."""
    world = WorldPreset("nano", 64, NANO_NAMES, ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)
    tokenizer = TextTokenizer.train(all_language(world, 2500, seed=0), 1024, words=world.names)
    unseen = list(all_language(world, 600, seed=1))
    ids, mask = tokenizer.encode(unseen)
    assert tokenizer.decode(ids) == [normalise(text) for text in unseen]
    assert all(normalise(name) == name and tokenizer.encode([name])[1].sum() == 1 for name in world.names)
    words = sum(len(text.split()) for text in unseen)
    assert int(mask.sum()) < 1.25 * words and not (ids == 2).any()


def test_normalisation() -> None:
    assert normalise("  Piñata\n“Café” – it’s\tOK ") == 'pinata "cafe" - it\'s ok'


@pytest.mark.parametrize("name", NAMES)
def test_required_words_are_whole_before_any_punctuation(tokenizer: TextTokenizer, name: str) -> None:
    assert tokenizer.is_whole(name)
    alone = tokenizer.encode([name])[0][0].tolist()
    for mark in ".,;?!:":
        assert tokenizer.encode([f"the {name}{mark}"])[0][0].tolist()[1:-1] == alone


def test_rare_required_words_win_over_a_large_corpus() -> None:
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (3000, 4), generator=rng).tolist()
    noise = [" ".join("".join(map(chr, word)) for word in letters)]
    assert TextTokenizer.train(noise, 200, words=["hippopotamus"]).is_whole("hippopotamus")


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="raise vocab_size"):
        TextTokenizer.train(CORPUS, 90, words=["hippopotamus", "rhinoceros"])


def test_training_is_deterministic(tokenizer: TextTokenizer) -> None:
    assert TextTokenizer.train(CORPUS, 512, words=NAMES).fingerprint == tokenizer.fingerprint


def test_batch_padding_and_mask(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.encode(["the dog", "", "a large red apple"])
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape
    assert mask.sum(1).tolist() == [2, 0, 4] and bool((ids[~mask] == 0).all())
    wider, _ = tokenizer.encode(["the dog"], length=9)
    assert wider.shape == (1, 9) and torch.equal(wider[0, :2], ids[0, :2])
    assert tokenizer.encode([""])[0].shape == (1, 1) and tokenizer.encode([], length=4)[0].shape == (0, 4)


def test_too_long_is_refused_or_cut(tokenizer: TextTokenizer) -> None:
    text = "the dog " * 5000
    with pytest.raises(InputError, match="10000 tokens.*limit is 64"):
        tokenizer.encode([text], length=64)
    ids, mask = tokenizer.encode([text], length=64, truncate=True)
    assert ids.shape == (1, 64) and bool(mask.all())


def test_decoding_stops_at_padding(tokenizer: TextTokenizer) -> None:
    ids, _ = tokenizer.encode(["the dog", "red"], length=4)
    ids[0, 3] = ids[1, 0]
    assert tokenizer.decode(ids) == ["the dog", "red"]
    assert tokenizer.decode(ids.tolist()) == ["the dog", "red"] and tokenizer.decode([[], [0]]) == ["", ""]


def test_special_strings_of_users_are_text(tokenizer: TextTokenizer) -> None:
    ids, _ = tokenizer.encode(["a [MASK] [PAD] [UNK]"])
    assert not {0, 1, 2} & set(ids[0].tolist())
    assert tokenizer.decode(ids) == ["a [mask] [pad] [unk]"]


def test_gaps(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.encode(["a [MASK] dog, [MASK][MASK]."], gaps=True)
    assert (ids == tokenizer.mask_token_id).sum() == 3 and bool(mask.all())
    assert tokenizer.decode(ids) == ["a [MASK] dog, [MASK] [MASK]."]
    full = tokenizer.encode(["a dog, dog."])[0][0]
    full[3] = tokenizer.mask_token_id
    assert torch.equal(tokenizer.encode(["a dog, [MASK]."], gaps=True)[0][0, -2:], full[-2:])
    plain, _ = tokenizer.encode(["a dog"], gaps=True)
    assert torch.equal(plain, tokenizer.encode(["a dog"])[0])


def test_unknown_characters_are_one_token_and_dropped(tokenizer: TextTokenizer) -> None:
    ids, _ = tokenizer.encode(["日本語 dog"])
    assert (ids == 2).sum() == 1 and tokenizer.decode(ids) == ["dog"]


def test_not_texts(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="list of strings"):
        tokenizer.encode("a dog")
    with pytest.raises(InputError, match="list of strings"):
        tokenizer.encode([b"a dog"])  # type: ignore[list-item]


def test_saved_is_loaded_exactly(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = TextTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == tokenizer.vocab_size
    texts = [*CORPUS[:3], "[MASK]"]
    assert torch.equal(loaded.encode(texts)[0], tokenizer.encode(texts)[0])


def test_bad_folders(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        tokenizer.save_pretrained(tmp_path / "file")


def t5_like(sentinel: bool) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with T5's special tokens."""
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁dog", "▁", ",", *(["<extra_id_0>"] if sentinel else [])]
    backend = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    extra = ["<extra_id_0>"] if sentinel else []
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=extra,
    )


@pytest.mark.parametrize("sentinel", [True, False])
def test_published_tokenizers_can_be_wrapped(sentinel: bool, tmp_path: Path) -> None:
    wrapped = TextTokenizer.from_transformers(t5_like(sentinel))
    assert wrapped.mask_token_id == 8 and wrapped.vocab_size == 9 and wrapped.eos_token_id == 1
    ids, _ = wrapped.encode(["a red dog", "a [MASK] dog"], gaps=True)
    assert ids.tolist() == [[3, 4, 5, 1], [3, 8, 5, 1]]
    assert wrapped.decode(ids) == ["a red dog", "a [MASK] dog"]
    wrapped.save_pretrained(tmp_path)
    assert TextTokenizer.from_pretrained(tmp_path).fingerprint == wrapped.fingerprint
