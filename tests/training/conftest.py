"""The tiny flavour's configuration, cut down further so that a step takes milliseconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from unialignment.training.config import AutoencoderConfig, TransformerConfig, load_config


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, nano) -> Path:
    """A tokenizer trained once for all tests."""
    from unialignment.model.tokenizer import TextTokenizer
    from unialignment.world.stream import all_language

    folder = tmp_path_factory.mktemp("tokenizer")
    TextTokenizer.train(all_language(nano, 3000, seed=0), 1024, words=nano.names).save_pretrained(folder)
    return folder


@pytest.fixture()
def tiny(repo_root: Path, tmp_path: Path, tokenizer_folder: Path) -> Callable[..., TransformerConfig]:
    """Makes tiny configurations: ``tiny("optimizer.lr=1", ...)``; runs go to ``tmp_path / "run"``."""

    def make(*overrides: str) -> TransformerConfig:
        return load_config(
            repo_root / "configs" / "tiny.yaml",
            [
                f"run.dir={tmp_path / 'run'}",
                f"text.tokenizer={tokenizer_folder}",
                "data.workers=0",
                "logging.tensorboard=false",
                "logging.log_every=1",
                "logging.validation_samples=2",
                "logging.samples=false",
                "run.max_steps=6",
                *overrides,
            ],
        )

    return make


@pytest.fixture()
def tiny_autoencoder(repo_root: Path, tmp_path: Path) -> Callable[..., AutoencoderConfig]:
    """Makes configurations of a very small autoencoder."""

    def make(*overrides: str) -> AutoencoderConfig:
        return load_config(
            repo_root / "configs" / "autoencoder.yaml",
            [
                f"run.dir={tmp_path / 'run'}",
                "run={budget_seconds: null, max_steps: 6, compile: off, threads: 1}",
                "model={latent_channels: 4, encoder_channels: [8, 8], decoder_channels: [8, 8], encoder_layers: [1, 1],"
                " decoder_layers: [1, 1]}",
                "batch_size=4",
                "validation_pictures=2",
                "log_every=1",
                "data.workers=0",
                *overrides,
            ],
        )

    return make


@pytest.fixture()
def silent() -> Console:
    """A console that prints nothing."""
    return Console(quiet=True)


@pytest.fixture(scope="session")
def workers() -> ModuleType:
    """``worker.py`` of this folder: starts runs in processes of their own."""
    spec = importlib.util.spec_from_file_location("training_worker", Path(__file__).with_name("worker.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
