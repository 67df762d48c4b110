"""LoRA files in every form that SD 3's come in, against diffusers' own model and against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unialignment.errors import CheckpointError, ConfigError, InputError
from unialignment.model.initialise import initialise_from_sd3
from unialignment.model.lora import (
    add_lora,
    load_lora,
    lora_pairs,
    merge_lora,
    read_lora,
    save_lora,
    set_scale,
)
from unialignment.model.transformer import UniAlignmentTransformer

SIZES: dict[str, Any] = {
    **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16},
    **{"num_attention_heads": 4, "joint_attention_dim": 48, "pos_embed_max_size": 12, "vocab_size": 64},
}
WIDTH = 64


def make_transformer(seed: int = 0, **changes: Any) -> UniAlignmentTransformer:
    torch.manual_seed(seed)
    model = UniAlignmentTransformer(**{**SIZES, **changes}).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "text_embeds": torch.randn(2, 5, 48, generator=generator),
        "latents": torch.randn(2, 4, 8, 6, generator=generator),
        "timestep": torch.tensor([300.0, 800.0]),
        "target": "both",
    }


@torch.no_grad()
def outputs(model: UniAlignmentTransformer) -> torch.Tensor:
    output = model(**inputs())
    return torch.cat([output.velocity.flatten(), output.text_logits.flatten()])


def halves(down: int, up: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, down, generator=generator) * 0.3, torch.randn(up, rank, generator=generator) * 0.3


def write(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.clone() for name, value in state.items()}, str(path), metadata=metadata)
    return path


def randomise(model: UniAlignmentTransformer, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def changed_by_hand(deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    model = make_transformer()
    for layer, delta in deltas.items():
        model.get_submodule(layer).weight.add_(delta)
    return outputs(model)


def test_a_new_adapter_changes_nothing_and_freezes_the_rest() -> None:
    model = make_transformer()
    before = outputs(model)
    layers = add_lora(model, rank=4)
    assert len(layers) == 16  # eight projections in each of two blocks
    assert torch.equal(outputs(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"
    }


@pytest.mark.parametrize("spelling", ["A/B", "down/up", "base_model", "processor"])
def test_diffusers_form_equals_the_change_of_weights(spelling: str, tmp_path: Path) -> None:
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_v_proj"]
    state, deltas = {}, {}
    for index, layer in enumerate(layers):
        down, up = halves(WIDTH, WIDTH, 3 + index, index)
        deltas[layer] = up @ down
        name, first, second = f"transformer.{layer}", "lora_A", "lora_B"
        if spelling == "down/up":
            first, second = "lora_down", "lora_up"
            state[f"{name}.alpha"] = torch.tensor(1.5)
            deltas[layer] = deltas[layer] * 1.5 / (3 + index)
        if spelling == "base_model":
            name = f"base_model.model.{layer}"
        if spelling == "processor":
            name = name.replace(".attn.", ".attn.processor.") + "_lora"
            first, second = "down", "up"
        state |= {f"{name}.{first}.weight": down, f"{name}.{second}.weight": up}
    model = make_transformer()
    report = load_lora(model, write(tmp_path / "a.safetensors", state))
    assert (report.form, report.matched, report.unmatched) == ("diffusers", tuple(sorted(layers)), {})
    torch.testing.assert_close(outputs(model), changed_by_hand(deltas), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(model), outputs(make_transformer()), atol=1e-2)


def test_kohya_form_with_fused_projections_and_alpha(tmp_path: Path) -> None:
    state, deltas = {}, {}
    for index, (name, layers) in enumerate(
        {
            "joint_blocks_0_x_block_attn_qkv": [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")],
            "joint_blocks_1_context_block_attn_qkv": [
                f"transformer_blocks.1.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")
            ],
            "joint_blocks_1_x_block_attn_proj": ["transformer_blocks.1.attn.to_out.0"],
            "joint_blocks_0_x_block_mlp_fc1": ["transformer_blocks.0.ff.net.0.proj"],
            "joint_blocks_0_context_block_mlp_fc2": ["transformer_blocks.0.ff_context.net.2"],
            "joint_blocks_0_context_block_adaLN_modulation_1": ["transformer_blocks.0.norm1_context.linear"],
        }.items()
    ):
        linear = make_transformer().get_submodule(layers[0])
        down, up = halves(linear.in_features, linear.out_features * len(layers), 4, index)
        state |= {
            f"lora_unet_{name}.lora_down.weight": down,
            f"lora_unet_{name}.lora_up.weight": up,
            f"lora_unet_{name}.alpha": torch.tensor(2.0),
        }
        deltas |= {layer: 0.5 * part @ down for layer, part in zip(layers, up.chunk(len(layers)), strict=True)}
    model = make_transformer()
    report = load_lora(model, write(tmp_path / "k.safetensors", state))
    assert report.form == "kohya" and set(report.matched) == set(deltas) and not report.unmatched
    torch.testing.assert_close(outputs(model), changed_by_hand(deltas), atol=1e-5, rtol=1e-5)


def test_kohya_form_with_the_layer_names_of_diffusers(tmp_path: Path) -> None:
    down, up = halves(WIDTH, WIDTH, 2, 0)
    stem = "lora_unet_transformer_blocks_1_attn_to_out_0"
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    model = make_transformer()
    load_lora(model, write(tmp_path / "k.safetensors", state))
    expected = changed_by_hand({"transformer_blocks.1.attn.to_out.0": 0.5 * up @ down})
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)


def test_final_modulations_are_swapped_where_spellings_differ(tmp_path: Path) -> None:
    """SD 3's original code has (shift, scale) where diffusers has (scale, shift)."""
    down, up = halves(WIDTH, 2 * WIDTH, 2, 0)
    final = {"lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": down}
    final["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"] = up
    pairs, _ = read_lora(write(tmp_path / "a.safetensors", final), make_transformer())
    torch.testing.assert_close(pairs["image_norm_out.linear"].up, torch.cat([up[WIDTH:], up[:WIDTH]]))
    theirs = {"transformer.norm_out.linear.lora_A.weight": down, "transformer.norm_out.linear.lora_B.weight": up}
    pairs, _ = read_lora(write(tmp_path / "b.safetensors", theirs), make_transformer())
    torch.testing.assert_close(pairs["image_norm_out.linear"].up, up)
    # The last block's context: two vectors there, six here, of which the first two are shift and scale.
    layer = "transformer_blocks.1.norm1_context.linear"
    shift, scale = up.chunk(2)
    for stem, given in (
        (f"transformer.{layer}", torch.cat([scale, shift])),
        ("lora_unet_joint_blocks_1_context_block_adaLN_modulation_1", torch.cat([shift, scale])),
    ):
        state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": given}
        pairs, report = read_lora(write(tmp_path / "c.safetensors", state), make_transformer())
        assert not report.unmatched
        torch.testing.assert_close(pairs[layer].up, torch.cat([shift, scale, torch.zeros(4 * WIDTH, 2)]))


def test_kohya_form_of_the_second_attention(tmp_path: Path) -> None:
    """SD 3.5's: fused like the first, and three more vectors in the norm, in the order of diffusers."""
    changes: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    state, deltas = {}, {}
    for index, (name, layers) in enumerate(
        {
            "attn2_qkv": [f"transformer_blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v")],
            "attn2_proj": ["transformer_blocks.0.attn2.to_out.0"],
            "adaLN_modulation_1": ["transformer_blocks.0.norm1.linear"],
        }.items()
    ):
        linear = make_transformer(**changes).get_submodule(layers[0])
        down, up = halves(linear.in_features, linear.out_features * len(layers), 4, index)
        stem = f"lora_unet_joint_blocks_0_x_block_{name}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        deltas |= {layer: part @ down for layer, part in zip(layers, up.chunk(len(layers)), strict=True)}
    model, expected = make_transformer(**changes), make_transformer(**changes)
    report = load_lora(model, write(tmp_path / "k.safetensors", state))
    assert set(report.matched) == set(deltas) and not report.unmatched
    with torch.no_grad():
        for layer, delta in deltas.items():
            expected.get_submodule(layer).weight.add_(delta)
    torch.testing.assert_close(outputs(model), outputs(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flavour", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}], ids=["3.0", "3.5"])
def test_a_lora_of_diffusers_does_here_what_it_does_there(flavour: dict[str, Any], tmp_path: Path) -> None:
    """Trained on their class on every linear layer, saved by their pipeline, loaded onto what their weights became."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict

    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"} | flavour
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(**sizes, caption_projection_dim=WIDTH, pooled_projection_dim=8).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "base")
    layers = [name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = [name for name in layers if "text_embedder" not in name]  # the pooled projection is dropped here
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=layers))
    randomise(theirs)  # type: ignore[arg-type]
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(theirs))
    ours, _ = initialise_from_sd3(tmp_path / "base", vocab_size=64)
    report = load_lora(ours, tmp_path, scale=5 / 3)  # an older file of theirs doesn't tell its alpha
    assert len(report.matched) == len(layers) and not report.unmatched
    given = inputs()
    del given["target"]
    with torch.no_grad():
        text, latents, timestep = given["text_embeds"], given["latents"], given["timestep"]
        expected = theirs(latents, text, torch.zeros(2, 8), timestep).sample
        found = ours(**given).velocity
        theirs.disable_adapters()
        plain = theirs(latents, text, torch.zeros(2, 8), timestep).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - plain).abs().max() > 0.1


def test_what_has_no_place_is_listed_with_its_reason(tmp_path: Path) -> None:
    down, up = halves(WIDTH, WIDTH, 2, 0)
    wide, _ = halves(WIDTH + 1, WIDTH, 2, 0)
    fits = "transformer.transformer_blocks.0.attn.to_q"
    state = {
        **{f"{fits}.lora_A.weight": down, f"{fits}.lora_B.weight": up},
        "text_encoder.layers.0.q_proj.lora_A.weight": down,
        "text_encoder.layers.0.q_proj.lora_B.weight": up,
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": down,
        "transformer.transformer_blocks.7.attn.to_q.lora_B.weight": up,
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": wide,
        "transformer.transformer_blocks.1.attn.to_q.lora_B.weight": up,
        "transformer.transformer_blocks.1.attn.to_k.lora_A.weight": down,
        "transformer.pos_embed.proj.lora_A.weight": down,
        "transformer.pos_embed.proj.lora_B.weight": up,
        "something": torch.zeros(1),
    }
    report = load_lora(make_transformer(), write(tmp_path / "a.safetensors", state))
    assert report.matched == ("transformer_blocks.0.attn.to_q",)
    assert set(report.unmatched) == {
        "text_encoder.layers.0.q_proj",
        "transformer.transformer_blocks.7.attn.to_q",
        "transformer.transformer_blocks.1.attn.to_q",
        "transformer.transformer_blocks.1.attn.to_k",
        "transformer.pos_embed.proj",
        "something",
    }
    assert "65" in report.unmatched["transformer.transformer_blocks.1.attn.to_q"]
    assert "6 unmatched" in report.summary()


def test_scale(tmp_path: Path) -> None:
    model = make_transformer()
    before = outputs(model)
    add_lora(model, rank=2)
    randomise(model)
    file = save_lora(model, tmp_path)
    full = outputs(model)
    loaded = make_transformer()
    load_lora(loaded, file, scale=0.0)
    torch.testing.assert_close(outputs(loaded), before, atol=1e-6, rtol=0)
    set_scale(loaded, 1.0)
    torch.testing.assert_close(outputs(loaded), full, atol=1e-6, rtol=0)


def test_saved_and_loaded_with_alpha(tmp_path: Path) -> None:
    model = make_transformer()
    add_lora(model, rank=2, alpha=6, targets=("to_q", "ff.net.2", "image_proj_out", "norm1.linear"))
    randomise(model)
    expected = outputs(model)
    file = save_lora(model, tmp_path)
    assert "transformer.proj_out.lora_A.weight" in load_file(file)
    loaded = make_transformer()
    report = load_lora(loaded, file)
    assert not report.unmatched
    assert {pair.alpha for pair in lora_pairs(loaded).values()} == {6.0}
    torch.testing.assert_close(outputs(loaded), expected, atol=1e-6, rtol=0)
    again = save_lora(loaded, tmp_path / "again.safetensors")
    assert all(torch.equal(value, load_file(again)[name]) for name, value in load_file(file).items())


def test_diffusers_reads_what_we_save(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    model = make_transformer()
    add_lora(model, rank=2, alpha=5)
    randomise(model)
    file = save_lora(model, tmp_path)
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    theirs = SD3Transformer2DModel(**sizes, caption_projection_dim=WIDTH, pooled_projection_dim=8)
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    # Their last block's context has no output projection.
    state = {name: value for name, value in load_file(file).items() if "blocks.1.attn.to_add_out" not in name}
    theirs.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    theirs_layer = theirs.get_submodule("transformer_blocks.0.attn.add_k_proj")
    delta = theirs_layer.get_delta_weight(theirs_layer.active_adapters[0])
    expected = lora_pairs(model)["transformer_blocks.0.attn.add_k_proj"].delta()
    torch.testing.assert_close(delta, expected)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_merged_equals_the_adapter(scale: float, tmp_path: Path) -> None:
    model = make_transformer()
    add_lora(model, rank=3, alpha=4, targets=("to_q", "to_add_out", "ff.net.0.proj", "context_embedder"))
    randomise(model)
    set_scale(model, scale)
    expected = outputs(model)
    merge_lora(model)
    assert set(model.state_dict()) == set(make_transformer().state_dict())
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)


def test_two_adapters(tmp_path: Path) -> None:
    model = make_transformer()
    add_lora(model, rank=2)
    randomise(model)
    file = save_lora(model, tmp_path)
    both = make_transformer()
    load_lora(both, file, name="one")
    load_lora(both, file, name="two")
    with pytest.raises(InputError, match="loaded already"):
        load_lora(both, file, name="one")
    assert set(lora_pairs(both, "two")) == set(lora_pairs(model))


def test_bad_files_leave_the_model_alone(tmp_path: Path) -> None:
    model = make_transformer()
    down, up = halves(WIDTH, WIDTH, 2, 0)
    stem = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    cases = {
        "no LoRA": {"a.weight": down},
        "another architecture": {"transformer.single.to_q.lora_A.weight": down,
                                 "transformer.single.to_q.lora_B.weight": up},
        "DoRA": {**good, f"{stem}.dora_scale": up},
        "twice": {**good, f"lora_unet_{stem[12:].replace('.', '_')}.lora_down.weight": down,
                  f"lora_unet_{stem[12:].replace('.', '_')}.lora_up.weight": up},
    }  # fmt: skip
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load_lora(model, write(tmp_path / "bad.safetensors", state))
    with pytest.raises(CheckpointError, match="no LoRA at"):
        load_lora(model, tmp_path / "absent.safetensors")
    torch.save(good, tmp_path / "lora.bin")
    with pytest.raises(CheckpointError, match="can run code"):
        load_lora(model, tmp_path / "lora.bin")
    (tmp_path / "cut.safetensors").write_bytes(write(tmp_path / "whole.safetensors", good).read_bytes()[:200])
    with pytest.raises(CheckpointError, match="truncated"):
        load_lora(model, tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match="fits no linear layer"):
        add_lora(model, 2, targets=("to_queue",))
    assert set(model.state_dict()) == set(make_transformer().state_dict())
