"""The autoencoder's trainer: it learns, resumes bit for bit, calibrates, and its data are what they claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from unialignment.errors import ConfigError
from unialignment.model.autoencoder import PixelAutoencoder, WorldAutoencoder, load_autoencoder
from unialignment.training.autoencoder import AutoencoderTrainer, main, to_pictures, to_tensor, validation_pictures
from unialignment.training.config import AutoencoderConfig
from unialignment.training.logging import read_metrics

Make = Callable[..., AutoencoderConfig]


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r}


def test_resuming_is_bit_exact(tiny_autoencoder: Make, tmp_path: Path, silent, monkeypatch, pack) -> None:
    whole = AutoencoderTrainer(tiny_autoencoder(f"run.dir={tmp_path / 'whole'}"), silent)
    whole.train()
    config = tiny_autoencoder("run.checkpoint_minutes=1e-9")
    real = WorldAutoencoder.training_loss
    calls = []

    def crash(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(WorldAutoencoder, "training_loss", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        AutoencoderTrainer(config, silent).train()
    monkeypatch.undo()
    second = AutoencoderTrainer(config, silent)
    second.train()
    assert second.resumed_at == 3 and losses(tmp_path / "run") == losses(tmp_path / "whole")
    for (name, a), b in zip(second.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_it_learns_and_saves_calibrated_weights(tiny_autoencoder: Make, tmp_path: Path, silent, pack) -> None:
    config = tiny_autoencoder("run.max_steps=40", "optimizer={lr: 5e-3, warmup_steps: 2}", "batch_size=8")
    folder = AutoencoderTrainer(config, silent).train()
    curve = list(losses(tmp_path / "run").values())
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    model = load_autoencoder(folder)
    producer = AutoencoderTrainer(tiny_autoencoder("run.fresh=true"), silent).source()
    with torch.no_grad():
        latents = model.encode(to_tensor(np.concatenate([producer(i) for i in range(100, 120)]), torch.device("cpu")))
    assert latents.mean((0, 2, 3)).abs().max() < 0.25
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.25
    assert "PSNR" in (tmp_path / "run" / "summary.md").read_text()
    assert list((tmp_path / "run" / "samples").glob("reconstruction-*.png"))


def test_validation_pictures_are_fixed_held_out_and_of_their_kind(tiny_autoencoder: Make, silent, pack) -> None:
    trainer = AutoencoderTrainer(tiny_autoencoder(), silent)
    again = AutoencoderTrainer(tiny_autoencoder(), silent)
    assert set(trainer.validation) == {"scene", "segment", "depth", "edges", "sprite"}
    assert all(np.array_equal(trainer.validation[k], again.validation[k]) for k in trainer.validation)
    assert set(np.unique(trainer.validation["segment"])) <= {0, 255}
    assert set(np.unique(trainer.validation["edges"])) <= {0, 255}
    depth = trainer.validation["depth"]
    assert (depth[..., 0] == depth[..., 1]).all() and len(np.unique(depth)) > 1
    assert trainer.source.split == "train"
    assert not np.array_equal(validation_pictures(trainer.source, 2)["scene"], trainer.validation["scene"])


def test_batches_are_pure_functions_of_their_index(tiny_autoencoder: Make, silent, pack) -> None:
    source = AutoencoderTrainer(tiny_autoencoder(), silent).source
    one, two = source(), source()
    two(0)
    assert np.array_equal(one(7), two(7)) and not np.array_equal(one(7), one(8))


def test_resuming_with_another_model_is_refused(tiny_autoencoder: Make, silent, pack) -> None:
    AutoencoderTrainer(tiny_autoencoder("run.max_steps=1"), silent).train()
    with pytest.raises(ConfigError, match=r"'batch_size'.*run\.fresh"):
        AutoencoderTrainer(tiny_autoencoder("batch_size=3"), silent).train()
    trainer = AutoencoderTrainer(tiny_autoencoder("batch_size=3", "run.fresh=true", "run.max_steps=2"), silent)
    trainer.train()
    assert trainer.resumed_at is None and trainer.progress.step == 2


def test_a_decoder_alone_is_trained_and_latents_stay_what_they_were(
    tiny_autoencoder: Make, tmp_path: Path, silent, pack
) -> None:
    first = AutoencoderTrainer(tiny_autoencoder(f"run.dir={tmp_path / 'first'}"), silent).train()
    config = tiny_autoencoder(f"initial={first}", "decoder_only=true")
    again = AutoencoderTrainer(config, silent).train()
    old, new = load_autoencoder(first), load_autoencoder(again)
    pictures = to_tensor(next(iter(AutoencoderTrainer(config, silent).validation.values())), torch.device("cpu"))
    latents = old.encode(pictures)
    assert torch.equal(latents, new.encode(pictures))
    assert not torch.equal(old.decode(latents), new.decode(latents))


def test_a_decoder_alone_needs_an_autoencoder_to_start_from(tiny_autoencoder: Make, silent, pack) -> None:
    with pytest.raises(ConfigError, match="initial="):
        AutoencoderTrainer(tiny_autoencoder("decoder_only=true"), silent)


def test_an_autoencoder_of_another_kind_is_refused(tiny_autoencoder: Make, tmp_path: Path, silent, pack) -> None:
    PixelAutoencoder().save_pretrained(tmp_path / "pixels")
    with pytest.raises(ConfigError, match="PixelAutoencoder"):
        AutoencoderTrainer(tiny_autoencoder(f"initial={tmp_path / 'pixels'}"), silent)


def test_pictures_survive_the_tensor_round_trip() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(to_pictures(to_tensor(pictures, torch.device("cpu"), channels_last=True)), pictures)


def test_a_mix_of_nothing_and_unknown_model_arguments_are_refused(tiny_autoencoder: Make, silent, pack) -> None:
    with pytest.raises(ConfigError, match="mix"):
        AutoencoderTrainer(tiny_autoencoder("mix={scenes: 0, maps: 0, singles: 0}"), silent).train()
    with pytest.raises(ConfigError, match="WorldAutoencoder"):
        AutoencoderTrainer(tiny_autoencoder("model={latent_chanels: 3}"), silent)


def test_the_command_line_prints_one_line_for_a_mistake(capsys, repo_root: Path) -> None:
    assert main([]) == 1
    assert main([str(repo_root / "configs" / "tiny.yaml")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "Usage" in lines[0] and "transformer" in lines[1]
