"""A grown model is larger, computes the same, and learns in what was added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unialignment import UniAlignmentPipeline
from unialignment.cli import main
from unialignment.errors import CheckpointError, InputError, StorageError
from unialignment.model.growth import block_sources, grow
from unialignment.model.transformer import UniAlignmentTransformer


def passes(model: UniAlignmentTransformer) -> list[torch.Tensor]:
    """What both heads say of random inputs."""
    generator, config = torch.Generator().manual_seed(0), model.config
    prompt, words = torch.randn(2, 2, 5, config.joint_attention_dim, generator=generator)
    given: dict[str, Any] = {"latents": torch.randn(2, config.in_channels, 8, 8, generator=generator)}
    drawn = model(**given, text_embeds=prompt, timestep=torch.tensor([300.0, 900.0]), target="image").velocity
    given |= {"text_embeds": words, "condition_text_embeds": prompt, "timestep": torch.zeros(2)}
    return [drawn, model(**given, target="text").text_logits]


def of(folder: Path) -> UniAlignmentTransformer:
    return UniAlignmentPipeline.from_pretrained(folder, device="cpu").transformer


@pytest.mark.parametrize("mode", ["prefix", "joint"])
@pytest.mark.parametrize("sizes", [{"num_layers": 5}, {"mlp_ratio": 5.5}, {"num_layers": 3, "mlp_ratio": 8}])
def test_it_computes_the_same_and_learns(make_tiny_pipeline: Any, tmp_path: Path, mode: str, sizes: Any) -> None:
    pipe = make_tiny_pipeline(seed=5, attention_mode=mode)
    pipe.save_pretrained(tmp_path / "small")
    facts = grow(tmp_path / "small", tmp_path / "large", **sizes)
    model = of(tmp_path / "large")
    assert model.config.num_layers == sizes.get("num_layers", 2) == len(model.transformer_blocks)
    assert model.config.mlp_ratio == sizes.get("mlp_ratio", 4.0)
    counts = [sum(p.numel() for p in each.parameters()) for each in (pipe.transformer, model)]
    assert facts["parameters"] == counts
    with torch.no_grad():
        for new, old in zip(passes(model), passes(of(tmp_path / "small")), strict=True):
            assert float(old.abs().mean()) > 0.05
            torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)
    # Everything that was added, and silent, hears of the loss: the next step changes what is computed.
    sum((output * torch.linspace(-1, 1, output.shape[-1])).square().mean() for output in passes(model)).backward()
    silent = [
        (name, part.weight)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and bool((part.weight == 0).flatten(1).all(0).any())
    ]
    assert len(silent) >= 4
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
    for name, weight in silent:
        if weight.grad is None:  # the last block's part that no output depends on, in either model
            assert name.startswith(last), name
            continue
        assert float(weight.grad[weight == 0].abs().max()) > 0, name


def test_added_blocks_are_spread_evenly() -> None:
    assert block_sources(8, 12) == [
        *[(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)],
        *[(4, False), (5, False), (5, True), (6, False), (7, False), (7, True)],
    ]
    assert block_sources(1, 3) == [(0, False), (0, True), (0, True)]
    assert [old for old, added in block_sources(5, 7) if not added] == list(range(5))


def test_by_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "large"
    assert main(["grow", str(tiny_folder), "--layers", "4", "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_layers"] == [2, 4]
    assert facts["parameters"][1] > facts["parameters"][0]
    assert not (out / "card.md").exists()
    assert main(["grow", str(tiny_folder), "-o", str(tmp_path / "other")]) == 2
    assert "--layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 1}, "more blocks"),
        ({"num_layers": 2}, "more blocks"),
        ({"num_layers": 3, "mlp_ratio": 2}, "larger multiple"),
        ({"mlp_ratio": 4.01}, "whole number"),
    ],
)
def test_what_does_not_grow_is_refused(tiny_folder: Path, tmp_path: Path, sizes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        grow(tiny_folder, tmp_path / "large", **sizes)
    assert not (tmp_path / "large").exists()


def test_other_folders_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(StorageError, match="something is there"):
        grow(tiny_folder, tmp_path / "taken", num_layers=3)
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        grow(tmp_path / "empty", tmp_path / "large", num_layers=3)
