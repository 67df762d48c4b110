"""A LoRA run: only the adapter learns, it resumes exactly, and its file gives the validated weights back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from unialignment.errors import ConfigError
from unialignment.model.lora import load_lora, lora_pairs
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.training.config import OptimizerSection, TransformerConfig
from unialignment.training.loop import Trainer
from unialignment.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, repo_root: Path) -> Path:
    """A tiny random model that the world's language fits."""
    from unialignment.model.autoencoder import PixelAutoencoder
    from unialignment.model.text import TokenEmbedder
    from unialignment.model.tokenizer import TextTokenizer
    from unialignment.model.transformer import UniAlignmentTransformer
    from unialignment.training.build import transformer_arguments
    from unialignment.training.config import load_config

    torch.manual_seed(0)
    tokenizer = TextTokenizer.from_pretrained(tokenizer_folder)
    config = load_config(repo_root / "configs" / "tiny.yaml")
    transformer = UniAlignmentTransformer(**transformer_arguments(config, 64, 3, tokenizer.vocab_size))
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    embedder = TokenEmbedder(tokenizer.vocab_size, transformer.config.joint_attention_dim, 128)
    folder = tmp_path_factory.mktemp("base") / "model"
    UniAlignmentPipeline(transformer, embedder, PixelAutoencoder(), tokenizer, name="base").save_pretrained(folder)
    return folder


@pytest.fixture()
def config(tiny: Callable[..., TransformerConfig], base: Path) -> Callable[..., TransformerConfig]:
    def make(*overrides: str) -> TransformerConfig:
        return tiny(
            f"model.initial={base}",
            "text.tokenizer=null",
            "lora.rank=4",
            "optimizer.lr=0.02",
            "optimizer.warmup_steps=0",
            "mixture={generate: 2, caption: 2, edit: 0, perceive: 0, control: 0, compose: 0, answer: 0, infill: 0}",
            *overrides,
        )

    return make


def test_only_the_adapter_learns_and_its_file_gives_the_weights_back(config, base: Path, silent: Console) -> None:
    trainer = Trainer(config("ema.decay=0"), silent)
    frozen = {name: value.clone() for name, value in trainer.objective.state_dict().items() if "lora" not in name}
    folder = trainer.train()
    assert folder.name == "lora" and not (folder.parent / "model").exists()
    assert all(torch.equal(value, trainer.objective.state_dict()[name]) for name, value in frozen.items())
    trained = lora_pairs(trainer.objective.transformer)
    assert all(bool(pair.up.any()) for layer, pair in trained.items() if "to_q" in layer)
    keys = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") and ".lora_" in key for key in keys)
    loaded = UniAlignmentPipeline.from_pretrained(base, device="cpu")
    assert not load_lora(loaded.transformer, folder).unmatched
    torch.manual_seed(0)
    arguments = {
        "latents": torch.randn(1, 3, 64, 64),
        "text_embeds": torch.randn(1, 3, loaded.transformer.config.joint_attention_dim),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        trainer.objective.eval()
        torch.testing.assert_close(
            loaded.transformer(**arguments).velocity, trainer.objective.transformer(**arguments).velocity
        )


def test_a_lora_run_resumes_exactly_and_its_checkpoints_are_small(config, silent: Console) -> None:
    whole = Trainer(config(), silent)
    source = whole.source()
    micros = [[source(step)] for step in range(4)]
    for micro in micros[:2]:
        whole.step(micro)
    checkpoint = whole.save()
    size = sum(p.numel() for p in whole.parameters) * 4
    assert (checkpoint / "tensors.safetensors").stat().st_size < 5 * size + 200_000  # weights, average, two moments
    for micro in micros[2:]:
        whole.step(micro)
    again = Trainer(config(), silent)
    assert again.resume()
    for micro in micros[2:]:
        again.step(micro)
    expected = lora_pairs(whole.objective.transformer)
    for layer, pair in lora_pairs(again.objective.transformer).items():
        assert torch.equal(pair.up, expected[layer].up) and torch.equal(pair.down, expected[layer].down)
    with pytest.raises(ConfigError, match="lora"):
        Trainer(config("lora.rank=8"), silent).resume()


def test_frozen_weights_in_bfloat16(config, silent: Console) -> None:
    with pytest.raises(ConfigError, match=r"run\.precision"):
        config("lora.base_precision=bf16")
    overrides = ("lora.base_precision=bf16", "run.precision=bf16", "run.activation_checkpointing=true")
    trainer = Trainer(config(*overrides), silent)
    types = {name: p.dtype for name, p in trainer.objective.transformer.named_parameters()}
    assert {dtype for name, dtype in types.items() if "lora" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if "lora" not in name} == {torch.bfloat16}
    logs = trainer.step([trainer.source()(0)])
    assert torch.isfinite(logs["loss/total"]) and float(logs["gradient_norm"]) > 0
    assert trainer.validate()["task/generate"] > 0


def test_activation_checkpointing_changes_no_gradient(config, silent: Console) -> None:
    norms = []
    for switch in ("false", "true"):
        trainer = Trainer(config(f"run.activation_checkpointing={switch}"), silent)
        norms.append(trainer.step([trainer.source()(0)])["gradient_norm"])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)


def test_bad_settings(tiny, config, silent: Console) -> None:
    with pytest.raises(ConfigError, match=r"model\.initial"):
        tiny("lora.rank=4")
    with pytest.raises(ConfigError, match="fits no linear layer"):
        Trainer(config("lora.targets=[to_queue]"), silent)
    with pytest.raises(ConfigError, match="bitsandbytes|CUDA"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerSection(name="adamw8bit"))
