"""Text embedders: saving, the mask token's own vector, frozen encoder, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from unialignment.errors import CheckpointError, InputError
from unialignment.model.text import T5TextEmbedder, TokenEmbedder, load_text_embedder

IDS = torch.tensor([[3, 4, 49, 1], [5, 49, 49, 0]])


def encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.5)
    return T5EncoderModel(config)


def test_table_adds_positions_and_trains() -> None:
    torch.manual_seed(0)
    embedder = TokenEmbedder(50, 8, max_length=6)
    vectors = embedder.embed(IDS)
    assert vectors.shape == (2, 4, 8) and embedder.embedding_dim == 8
    torch.testing.assert_close(vectors[1, 1] - vectors[1, 2], embedder.positions[1] - embedder.positions[2])
    assert torch.equal(embedder(IDS), vectors)
    vectors.sum().backward()
    assert embedder.table.weight.grad is not None and embedder.positions.grad is not None
    assert not embedder.positions.grad[4:].any()


def test_table_refuses_what_it_cannot_embed() -> None:
    embedder = TokenEmbedder(50, 8, max_length=3)
    with pytest.raises(InputError, match="3 positions"):
        embedder.embed(IDS)
    with pytest.raises(InputError, match="integer tensor"):
        embedder.embed(torch.zeros(1, 2))


def test_a_table_makes_room_for_longer_texts(tmp_path: Path) -> None:
    embedder = TokenEmbedder(50, 8, max_length=4)
    before = embedder.embed(IDS).detach()
    embedder.extend(6)
    assert torch.equal(embedder.embed(IDS), before) and embedder.positions.requires_grad
    longer = torch.cat([IDS, IDS[:, :2]], dim=1)
    assert torch.equal(embedder.embed(longer)[0, 5], embedder.table(longer)[0, 5] + embedder.positions[3])
    embedder.save_pretrained(tmp_path)
    assert load_text_embedder(tmp_path).embed(longer).shape == (2, 6, 8)
    with pytest.raises(InputError, match="6 positions already"):
        embedder.extend(5)


def test_saved_table_is_loaded_exactly(tmp_path: Path) -> None:
    embedder = TokenEmbedder(50, 8, max_length=6)
    embedder.save_pretrained(tmp_path)
    loaded = load_text_embedder(tmp_path)
    assert isinstance(loaded, TokenEmbedder) and torch.equal(loaded.embed(IDS), embedder.embed(IDS))


def test_t5_mask_has_its_own_vector() -> None:
    """The same as overwriting the mask token's row, without touching the encoder."""
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
    embedder = T5TextEmbedder(encoder(), 49, vector)
    reference = encoder().eval()
    with torch.no_grad():
        plain = reference(IDS).last_hidden_state
        reference.shared.weight[49] = vector
        torch.testing.assert_close(embedder.embed(IDS), reference(IDS).last_hidden_state)
    assert not torch.allclose(embedder.embed(IDS), plain)
    torch.testing.assert_close(T5TextEmbedder(encoder(), 49).embed(IDS), plain)


def test_t5_mask_beyond_the_vocabulary() -> None:
    with pytest.raises(InputError, match="give its mask_embedding"):
        T5TextEmbedder(encoder(), 50)
    ids = torch.tensor([[3, 50, 4]])
    embedder = T5TextEmbedder(encoder(), 50, torch.randn(16))
    assert embedder.embed(ids).shape == (1, 3, 16) and embedder.embedding_dim == 16
    with pytest.raises(InputError, match="beyond the encoder's 50 tokens"):
        embedder.embed(torch.tensor([[51]]))
    with pytest.raises(InputError, match=r"mask_embedding must be \[16\]"):
        T5TextEmbedder(encoder(), 50, torch.randn(8))


def test_t5_stays_frozen_in_a_training_loop() -> None:
    embedder = T5TextEmbedder(encoder(), 49).train()
    assert not embedder.encoder.training and not any(p.requires_grad for p in embedder.parameters())
    assert torch.equal(embedder.embed(IDS), embedder.embed(IDS)) and not embedder(IDS).requires_grad


def test_t5_attends_to_padding_only_in_the_published_form() -> None:
    short, long = torch.tensor([[3, 4, 1]]), torch.tensor([[3, 4, 1, 0, 0]])
    published, masked = T5TextEmbedder(encoder(), 49), T5TextEmbedder(encoder(), 49, use_attention_mask=True)
    assert not torch.allclose(published.embed(long, long != 0)[:, :3], published.embed(short), atol=1e-5)
    torch.testing.assert_close(masked.embed(long, long != 0)[:, :3], masked.embed(short))


@pytest.mark.parametrize("attention", [True, False])
def test_saved_t5_is_loaded_exactly(tmp_path: Path, attention: bool) -> None:
    embedder = T5TextEmbedder(encoder(), 49, torch.randn(16), use_attention_mask=attention)
    embedder.save_pretrained(tmp_path)
    loaded = load_text_embedder(tmp_path)
    assert isinstance(loaded, T5TextEmbedder) and loaded.mask_token_id == 49
    assert torch.equal(loaded.embed(IDS, IDS != 0), embedder.embed(IDS, IDS != 0))


def test_plain_t5_folder_needs_its_mask(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="mask_token_id=32099"):
        load_text_embedder(tmp_path)
    assert load_text_embedder(tmp_path, mask_token_id=49).embed(IDS).shape == (2, 4, 16)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no text embedder"):
        load_text_embedder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Mystery"}')
    with pytest.raises(CheckpointError, match="Mystery"):
        load_text_embedder(tmp_path)
    TokenEmbedder(50, 8).save_pretrained(tmp_path)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="cannot load TokenEmbedder"):
        load_text_embedder(tmp_path)
