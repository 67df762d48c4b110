"""The transformer: parity with the published implementation, exact caching, independence of batch neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unialignment.errors import ConfigError, InputError
from unialignment.model.cache import ConditionCache
from unialignment.model.transformer import UniAlignmentTransformer

SIZES = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pos_embed_max_size": 8,
    "vocab_size": 50,
}


def make(**changes: object) -> UniAlignmentTransformer:
    torch.manual_seed(0)
    model = UniAlignmentTransformer(**{**SIZES, **changes}).eval()
    # Zero-initialised gates and heads would make every comparison trivially true.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def prefix(**changes: object) -> UniAlignmentTransformer:
    options = {"modulation": "shared", "qk_norm": "rms_norm", "embedding_dim": 8, "aligned_source": True}
    return make(attention_mode="prefix", **{**options, **changes})


def inputs(batch: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6).unsqueeze(0) < torch.tensor([6, 2, 4]).unsqueeze(1)
    return {
        "text": torch.randn(batch, 6, 24, generator=generator),
        "mask": mask[:batch],
        "latents": torch.randn(batch, 4, 8, 8, generator=generator),
        "source": torch.randn(batch, 4, 8, 8, generator=generator),
        "second": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([37.0, 500.0, 980.0])[:batch],
    }


def every_signature(x: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    """One forward call for each combination of conditions and target that the tasks use."""
    text = {"text_embeds": x["text"], "text_mask": x["mask"]}
    question = {"condition_text_embeds": x["text"], "condition_text_mask": x["mask"]}
    answer = {"text_embeds": x["text"].flip(1), "target": "text", "timestep": torch.zeros_like(x["timestep"])}
    image = {"latents": x["latents"], "timestep": x["timestep"]}
    return {
        "generate": {**text, **image},
        "edit": {**text, **image, "sources": [x["source"]]},
        "compose": {**text, **image, "sources": [x["source"], x["second"]]},
        "caption": {**answer, "latents": x["latents"]},
        "answer": {**answer, **question, "latents": x["latents"]},
    }


# ---------------------------------------------------------------------------------- parity with the published model


@pytest.fixture(scope="module")
def official(shared_dir: Path) -> tuple[UniAlignmentTransformer, dict[str, torch.Tensor]]:
    folder = shared_dir / "parity" / "official-tiny"
    if not folder.is_dir():
        pytest.skip("the parity tensors are not at hand")
    model = UniAlignmentTransformer.from_pretrained(str(folder), subfolder="transformer")
    return model.eval(), load_file(folder / "cases.safetensors")


@pytest.mark.parametrize(
    ("case", "sources"),
    [("generate", []), ("edit", ["source_1"]), ("compose", ["source_1", "source_2", "source_3"])],
)
def test_image_passes_match_the_published_model(
    official: tuple[UniAlignmentTransformer, dict[str, torch.Tensor]], case: str, sources: list[str]
) -> None:
    model, tensors = official
    with torch.no_grad():
        output = model(
            text_embeds=tensors["text_embeds"],
            latents=tensors["latents"],
            sources=[tensors[name] for name in sources],
            timestep=tensors["timestep"],
            target="both",
        )
    for name in ("velocity", "text_logits", "image_features", "text_features"):
        torch.testing.assert_close(getattr(output, name), tensors[f"{case}.{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["understand", "text_only"])
def test_text_passes_match_the_published_model(
    official: tuple[UniAlignmentTransformer, dict[str, torch.Tensor]], case: str
) -> None:
    model, tensors = official
    with torch.no_grad():
        output = model(
            text_embeds=tensors["text_embeds"],
            latents=tensors["latents"] if case == "understand" else None,
            timestep=torch.zeros(2),
            target="text",
        )
    compared = [name for name in ("text_logits", "text_features") if f"{case}.{name}" in tensors]
    assert "text_logits" in compared
    for name in compared:
        torch.testing.assert_close(getattr(output, name), tensors[f"{case}.{name}"], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ exact condition cache


@pytest.mark.parametrize("signature", ["generate", "edit", "compose", "caption", "answer"])
def test_cached_equals_uncached(signature: str) -> None:
    model, x = prefix(), inputs()
    call = every_signature(x)[signature]
    text_target = call.get("target") == "text"
    with torch.no_grad():
        whole = model(**call)
        cache = model.prefill(
            text_embeds=call.get("condition_text_embeds") if text_target else call["text_embeds"],
            text_mask=call.get("condition_text_mask") if text_target else call.get("text_mask"),
            images=[call["latents"]] if text_target else call.get("sources", []),
        )
        for _ in range(2):  # the cache isn't consumed
            step = model.denoise(
                cache,
                latents=None if text_target else call["latents"],
                text_embeds=call["text_embeds"] if text_target else None,
                timestep=call["timestep"],
            )
    name = "text_logits" if text_target else "velocity"
    torch.testing.assert_close(getattr(step, name), getattr(whole, name), atol=1e-5, rtol=0)


def test_conditions_do_not_depend_on_the_target() -> None:
    model, x = prefix(), inputs()
    with torch.no_grad():
        first = model(text_embeds=x["text"], latents=x["latents"], timestep=x["timestep"])
        second = model(text_embeds=x["text"], latents=x["latents"] * 3, timestep=x["timestep"] / 2)
    torch.testing.assert_close(first.text_features, second.text_features, atol=0, rtol=0)
    assert not torch.allclose(first.velocity, second.velocity)


def test_joint_mode_lets_text_see_the_picture() -> None:
    model, x = make(), inputs()
    with torch.no_grad():
        first = model(text_embeds=x["text"], latents=x["latents"], timestep=x["timestep"], target="both")
        second = model(text_embeds=x["text"], latents=x["latents"] * 3, timestep=x["timestep"], target="both")
    assert not torch.allclose(first.text_features, second.text_features)


def test_concatenated_and_selected_caches_are_exact() -> None:
    model, x = prefix(), inputs()
    with torch.no_grad():
        full = model.prefill(text_embeds=x["text"], text_mask=x["mask"], images=[x["source"]])
        plain = model.prefill(text_embeds=x["text"][:, :1])
        assert full.aligned is not None
        both = ConditionCache.concatenate([full, plain])
        assert both.batch_size == 6 and both.length == full.length
        two = model.denoise(both, latents=x["latents"].repeat(2, 1, 1, 1), timestep=x["timestep"].repeat(2)).velocity
        one = model.denoise(full, latents=x["latents"], timestep=x["timestep"]).velocity
        other = model.denoise(plain, latents=x["latents"], timestep=x["timestep"]).velocity
        shared = model.denoise(
            full.select(torch.tensor([1, 1])),
            latents=x["latents"][1:2].expand(2, -1, -1, -1),
            timestep=x["timestep"][[1, 1]],
        ).velocity
    torch.testing.assert_close(two, torch.cat([one, other]), atol=1e-5, rtol=0)
    torch.testing.assert_close(shared, one[[1, 1]], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- batches, masks, positions


@pytest.mark.parametrize("mode", ["prefix", "joint"])
@pytest.mark.parametrize("signature", ["generate", "edit", "compose", "caption", "answer"])
def test_a_batch_equals_its_singles(mode: str, signature: str) -> None:
    model, x = prefix() if mode == "prefix" else make(), inputs()
    call = every_signature(x)[signature]
    name = "text_logits" if call.get("target") == "text" else "velocity"

    def row(value: object, index: int) -> object:
        if isinstance(value, list):
            return [row(item, index) for item in value]
        return value[index : index + 1] if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        together = getattr(model(**call), name)
        for index in range(3):
            alone = getattr(model(**{key: row(value, index) for key, value in call.items()}), name)
            torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)


def test_padding_text_changes_nothing() -> None:
    model, x = prefix(), inputs()
    padded = torch.nn.functional.pad(x["text"], [0, 0, 0, 5], value=7.0)
    mask = torch.nn.functional.pad(x["mask"], [0, 5])
    with torch.no_grad():
        short = model(text_embeds=x["text"], text_mask=x["mask"], latents=x["latents"], timestep=x["timestep"])
        long = model(text_embeds=padded, text_mask=mask, latents=x["latents"], timestep=x["timestep"])
    torch.testing.assert_close(short.velocity, long.velocity, atol=1e-5, rtol=0)


def test_reference_pictures_can_be_told_apart() -> None:
    model, x = prefix(), inputs()
    with torch.no_grad():
        one = model(
            text_embeds=x["text"], latents=x["latents"], sources=[x["source"], x["second"]], timestep=x["timestep"]
        )
        other = model(
            text_embeds=x["text"], latents=x["latents"], sources=[x["second"], x["source"]], timestep=x["timestep"]
        )
    assert not torch.allclose(one.velocity, other.velocity, atol=1e-4)


def test_an_aligned_source_adds_to_the_same_place_only() -> None:
    """With attention silenced, changing one patch of the source changes that patch of the prediction alone."""
    model, x = prefix(), inputs()
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn.to_out[0].weight)
    changed = x["source"].clone()
    changed[:, :, 2:4, 4:6] += 1
    with torch.no_grad():
        first, second = (
            model(text_embeds=x["text"], latents=x["latents"], sources=[source], timestep=x["timestep"]).velocity
            for source in (x["source"], changed)
        )
    difference = (first - second).abs().amax((0, 1))
    assert float(difference[2:4, 4:6].min()) > 0
    difference[2:4, 4:6] = 0
    assert float(difference.max()) == 0
    with pytest.raises(ConfigError, match="needs attention_mode='prefix'"):
        make(aligned_source=True)


def test_non_square_latents_are_placed_by_cropping_the_centre() -> None:
    model, x = prefix(), inputs()
    wide = x["latents"][:, :, :4]
    with torch.no_grad():
        assert model(text_embeds=x["text"], latents=wide, timestep=x["timestep"]).velocity.shape == wide.shape
        tokens = model.pos_embed(torch.zeros(1, 4, 4, 8))
    table = model.pos_embed.pos_embed.view(8, 8, -1)[3:5, 2:6].reshape(1, 8, -1)
    torch.testing.assert_close(tokens - model.pos_embed.proj.bias, table)


# ------------------------------------------------------------------------------------------------------ heads, features


def test_only_the_needed_head_runs() -> None:
    model, x = prefix(), inputs()
    ran: list[str] = []
    model.image_proj_out.register_forward_hook(lambda *_: ran.append("image"))
    model.text_proj_out.register_forward_hook(lambda *_: ran.append("text"))
    calls = every_signature(x)
    with torch.no_grad():
        assert model(**calls["edit"]).text_logits is None
        assert ran == ["image"]
        ran.clear()
        assert model(**calls["answer"]).velocity is None
        assert ran == ["text"]


def test_logits_at_chosen_positions_are_those_of_the_full_pass() -> None:
    model, x = prefix(), inputs()
    call = every_signature(x)["answer"]
    positions = torch.zeros(3, 6, dtype=torch.bool)
    positions[0, 2] = positions[2, 0] = positions[2, 5] = True
    with torch.no_grad():
        some = model(**call, logit_positions=positions).text_logits
        everything = model(**call).text_logits
    assert some.shape == (3, 50)
    torch.testing.assert_close(some, everything[positions])


def test_middle_features_are_those_of_the_named_block() -> None:
    model, x = prefix(), inputs()
    call = every_signature(x)["generate"]
    seen: list[torch.Tensor] = []
    model.transformer_blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out[0][-1].tokens))
    with torch.no_grad():
        output = model(**call, feature_layer=2)
    # The block ran twice: over the conditions, then over the target.
    torch.testing.assert_close(output.mid_text_features, seen[0])
    torch.testing.assert_close(output.mid_image_features, seen[1])


def test_x_prediction_returns_the_velocity_of_its_sample() -> None:
    model, x = prefix(prediction="sample"), inputs()
    with torch.no_grad():
        sigma = (x["timestep"] / 1000).view(-1, 1, 1, 1)
        velocity = model(text_embeds=x["text"], latents=x["latents"], timestep=x["timestep"]).velocity
        model.register_to_config(prediction="velocity")
        raw = model(text_embeds=x["text"], latents=x["latents"], timestep=x["timestep"]).velocity
    torch.testing.assert_close(x["latents"] - sigma * velocity, raw, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_parameter() -> None:
    model, x = prefix(), inputs()
    calls = every_signature(x)
    losses = [
        model(**calls["edit"]).velocity.square().mean(),
        model(**calls["compose"]).velocity.square().mean(),
        model(**calls["answer"]).text_logits.square().mean(),
    ]
    cache = model.prefill(text_embeds=x["text"], images=[x["source"]], features=True)
    losses += [
        model.embed(cache.output.text_features, "text").sum(),
        model.embed(cache.output.image_features, "image").sum(),
    ]
    sum(losses).backward()  # type: ignore[union-attr]
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["null_image_embd"]


def test_checkpointed_gradients_are_the_same() -> None:
    x = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = prefix().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**every_signature(x)["edit"]).velocity.square().mean().backward()
        gradients.append(model.transformer_blocks[0].ff.net[2].weight.grad)
    torch.testing.assert_close(*gradients)


def test_saving_and_loading_keeps_every_bit(tmp_path: Path) -> None:
    model, x = prefix(), inputs()
    model.save_pretrained(tmp_path)
    again = UniAlignmentTransformer.from_pretrained(str(tmp_path)).eval()
    call = every_signature(x)["edit"]
    with torch.no_grad():
        # Weights are the same bits; products may differ in the last one by where memory happens to be aligned.
        torch.testing.assert_close(model(**call).velocity, again(**call).velocity, atol=1e-5, rtol=0)
    for (name, saved), (_, loaded) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(saved, loaded), name
    assert json.loads((tmp_path / "config.json").read_text())["attention_mode"] == "prefix"


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mode": "causal"}, "attention_mode='causal'"),
        ({"caption_projection_dim": 7}, "must equal heads x head_dim = 32"),
        ({"dual_attention_layers": (0,), "modulation": "shared"}, "need modulation='block'"),
        ({"dual_attention_layers": (0, 3)}, "must be blocks 0 to 2"),
    ],
)
def test_contradictory_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_missing_inputs_are_named() -> None:
    model, x = prefix(), inputs()
    with pytest.raises(InputError, match="needs latents"):
        model(text_embeds=x["text"], timestep=x["timestep"])
    with pytest.raises(InputError, match="timestep is missing"):
        model(text_embeds=x["text"], latents=x["latents"])
    with pytest.raises(InputError, match="needs attention_mode='joint'"):
        model(text_embeds=x["text"], latents=x["latents"], timestep=x["timestep"], target="both")
    with pytest.raises(InputError, match="tells 4 apart"):
        model.prefill(text_embeds=x["text"], images=[x["source"]] * 5)
    with pytest.raises(InputError, match="multiple of the patch"):
        model(text_embeds=x["text"], latents=x["latents"][..., :7], timestep=x["timestep"])
    with pytest.raises(InputError, match="prefill needs attention_mode='prefix'"):
        make().prefill(text_embeds=x["text"])
