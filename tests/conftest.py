"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports a Hugging Face library: tests never touch the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared fixtures (parity cases, benchmark) beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no shared fixtures: {path} does not exist (parity and benchmark tests need it)")
    return path


@pytest.fixture(scope="session")
def pack():
    """The real sprite pack: the user's cached one, built once if there is none.

    A missing tool is an error, a registry out of reach a skip.
    """
    from unialignment.errors import AssetError
    from unialignment.world.assets import DownloadError, build_pack
    from unialignment.world.sprites import SpritePack

    try:
        return SpritePack.load()
    except AssetError:
        try:
            return SpritePack.load(build_pack())
        except DownloadError as error:
            pytest.skip(f"no sprite pack, and none can be built here: {error}")


@pytest.fixture(scope="session")
def nano(pack):
    """The nano preset."""
    from unialignment.world.presets import preset

    return preset("nano", pack)


@pytest.fixture(scope="session")
def renderer(pack):
    """A renderer at the nano preset's 64 px."""
    from unialignment.world.render import Renderer

    return Renderer(pack, 64)


WORDS = (
    *("a", "the", "dog", "cat", "apple", "red", "blue", "background", "with", "on", "what", "is", "and", "next", "to"),
    *("segment", "estimate", "depth", "detect", "edges", "replace", "by"),
)


def build_tiny_pipeline(seed: int = 0, attention_mode: str = "prefix", **options: object):
    """A random model of width 32 with every component: right in all mechanics, useless in all results."""
    import torch

    from unialignment.model.autoencoder import WorldAutoencoder
    from unialignment.model.text import TokenEmbedder
    from unialignment.model.tokenizer import TextTokenizer
    from unialignment.model.transformer import UniAlignmentTransformer
    from unialignment.pipeline import UniAlignmentPipeline

    torch.manual_seed(seed)
    tokenizer = TextTokenizer.train([" ".join(WORDS)], vocab_size=160, words=WORDS, min_frequency=1)
    autoencoder = WorldAutoencoder(
        latent_channels=4,
        encoder_channels=(8, 8),
        decoder_channels=(8, 8),
        encoder_layers=(1, 1),
        decoder_layers=(1, 1),
    )
    transformer = UniAlignmentTransformer(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pos_embed_max_size=8,
        vocab_size=tokenizer.vocab_size,
        attention_mode=attention_mode,
    )
    for parameter in transformer.parameters():  # zero-initialised gates and heads would hide every mistake
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    embedder = TokenEmbedder(tokenizer.vocab_size, 24, max_length=48)
    return UniAlignmentPipeline(transformer, embedder, autoencoder, tokenizer, name="tiny", **options)


@pytest.fixture(scope="session")
def make_tiny_pipeline():
    """Builds tiny random models: ``make_tiny_pipeline(seed=0, attention_mode="prefix")``."""
    return build_tiny_pipeline


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A tiny random model; don't change it."""
    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder; don't change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder
