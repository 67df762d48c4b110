"""What makes passes faster must not change them: room in caches, fused projections, the time's share computed ahead."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from unialignment.conditioning import Condition, Denoiser
from unialignment.model.blocks import FeedForward
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


def prefix(**changes: object) -> UniAlignmentTransformer:
    torch.manual_seed(0)
    options = {"modulation": "shared", "qk_norm": "rms_norm", "aligned_source": True}
    model = UniAlignmentTransformer(**{**SIZES, "attention_mode": "prefix", **options, **changes}).eval()
    for parameter in model.parameters():  # zero-initialised gates and heads would make every comparison trivially true
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text": torch.randn(3, 6, 24, generator=generator),
        "mask": torch.arange(6).unsqueeze(0) < torch.tensor([6, 2, 4]).unsqueeze(1),
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "source": torch.randn(3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([37.0, 500.0, 980.0]),
    }


@pytest.fixture(params=["shared", "block"])
def model(request: pytest.FixtureRequest) -> UniAlignmentTransformer:
    return prefix(modulation=request.param)


@torch.no_grad()
def test_room_for_own_keys_changes_nothing(model: UniAlignmentTransformer) -> None:
    x = inputs()
    full = model.prefill(text_embeds=x["text"], text_mask=x["mask"], images=[x["source"]])
    short = model.prefill(text_embeds=x["text"][:, :1])
    index = torch.tensor([2, 0, 0])
    roomy = ConditionCache.assemble([(full, index), (short, None)], room=16)
    assert roomy.room is not None
    assert roomy.length == full.length
    assert roomy.keys[0].data_ptr() == roomy.room[0][0].data_ptr(), "the conditions would be held twice"
    time = x["timestep"].repeat(2)
    for factor in (1, 2):  # the buffers are written anew by each step
        latents = x["latents"].repeat(2, 1, 1, 1) * factor
        one = model.denoise(roomy, latents=latents, timestep=time).velocity
        first = model.denoise(full.select(index), latents=latents[:3], timestep=time[:3]).velocity
        other = model.denoise(short, latents=latents[3:], timestep=time[3:]).velocity
        torch.testing.assert_close(one, torch.cat([first, other]), atol=1e-5, rtol=0)
    part = model.denoise(roomy.first(3), latents=latents[:3], timestep=time[:3]).velocity
    torch.testing.assert_close(part, first, atol=1e-5, rtol=0)
    chosen = roomy.select(torch.tensor([4, 1]))
    assert chosen.room is not None
    assert chosen.keys[0].data_ptr() == chosen.room[0][0].data_ptr()
    few = model.denoise(chosen, latents=latents[[4, 1]], timestep=time[[4, 1]]).velocity
    torch.testing.assert_close(few, one[[4, 1]], atol=1e-5, rtol=0)


def test_room_is_left_alone_where_gradients_are_needed(model: UniAlignmentTransformer) -> None:
    x = inputs()
    with torch.no_grad():
        roomy = ConditionCache.assemble([(model.prefill(text_embeds=x["text"]), None)], room=16)
    before = [key.clone() for key, _ in roomy.room]
    loss = model.denoise(roomy, latents=x["latents"], timestep=x["timestep"]).velocity.square().mean()
    loss.backward()
    for (key, _), old in zip(roomy.room, before, strict=True):
        # room is memory as it was found, which may hold nan
        torch.testing.assert_close(key, old, rtol=0, atol=0, equal_nan=True)


def test_assembled_caches_keep_gradients(model: UniAlignmentTransformer) -> None:
    x = inputs()
    caches = [model.prefill(text_embeds=x["text"]), model.prefill(text_embeds=x["text"][:, :2])]
    both = ConditionCache.concatenate(caches)
    model.denoise(
        both, latents=x["latents"].repeat(2, 1, 1, 1), timestep=x["timestep"].repeat(2)
    ).velocity.sum().backward()
    assert float(model.transformer_blocks[0].attn.add_k_proj.weight.grad.abs().max()) > 0


@torch.no_grad()
@pytest.mark.parametrize("stream", ["image", "text"])
def test_the_times_share_ahead_is_that_of_each_step(model: UniAlignmentTransformer, stream: str) -> None:
    x = inputs()
    cache = model.prefill(text_embeds=x["text"], images=[x["source"]])
    target = {"latents": x["latents"]} if stream == "image" else {"text_embeds": x["text"].flip(1)}
    name = "velocity" if stream == "image" else "text_logits"
    ahead = model.time_modulation(stream, torch.tensor([900.0, 250.0]))
    assert ahead is not None
    for step, time in enumerate((900.0, 250.0)):
        plain = getattr(model.denoise(cache, **target, timestep=torch.full((3,), time)), name)
        one = getattr(model.denoise(cache, **target, timestep=torch.tensor([time]), modulation=ahead.at(step)), name)
        torch.testing.assert_close(one, plain, atol=1e-5, rtol=0)


def test_no_share_ahead_when_weights_are_elsewhere(model: UniAlignmentTransformer) -> None:
    model.transformer_blocks[1].to("meta")
    assert model.time_modulation("image", torch.tensor([1.0])) is None


@torch.no_grad()
def test_fused_projections_are_the_same_weights(model: UniAlignmentTransformer, tmp_path: Path) -> None:
    x = inputs()
    call = {"text_embeds": x["text"], "latents": x["latents"], "sources": [x["source"]], "timestep": x["timestep"]}
    before, names = model(**call).velocity, list(model.state_dict())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.fuse_projections()
    attention = model.transformer_blocks[0].attn
    assert attention.to_k.weight.data_ptr() > attention.to_q.weight.data_ptr()
    assert attention.to_k.weight.untyped_storage().data_ptr() == attention.to_q.weight.untyped_storage().data_ptr()
    fused = attention._fused["image"][0].data_ptr()
    model.fuse_projections()
    assert attention._fused["image"][0].data_ptr() == fused, "a second call must do nothing"
    torch.testing.assert_close(model(**call).velocity, before, atol=1e-6, rtol=0)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = UniAlignmentTransformer.from_pretrained(str(tmp_path)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in values.items())


@torch.no_grad()
@pytest.mark.parametrize("change", ["assign", "in place", "cast", "copy", "layer"])
def test_changed_weights_are_noticed(model: UniAlignmentTransformer, change: str) -> None:
    """A stale fused weight would give the old model's answers."""
    x = inputs()
    call = {"text_embeds": x["text"], "latents": x["latents"], "timestep": x["timestep"]}
    model.fuse_projections()
    if change == "copy":
        model = copy.deepcopy(model)
        assert not model.transformer_blocks[1].attn._fused, "memory that nothing uses"
    attention = model.transformer_blocks[1].attn
    if change == "assign":
        attention.to_v.weight.data = attention.to_v.weight.data * 2
    elif change == "layer":
        attention.to_v = torch.nn.Linear(32, 32)
    elif change == "cast":
        model.double().float()
        attention.to_v.weight.mul_(2)
    else:
        attention.to_v.weight.mul_(2)
    fresh = UniAlignmentTransformer(**dict(model.config)).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**call).velocity, fresh(**call).velocity, atol=1e-6, rtol=0)


def test_gradients_reach_fused_layers(model: UniAlignmentTransformer) -> None:
    x = inputs()
    model.fuse_projections()
    model(text_embeds=x["text"], latents=x["latents"], timestep=x["timestep"]).velocity.square().mean().backward()
    assert float(model.transformer_blocks[0].attn.to_q.weight.grad.abs().max()) > 0


@torch.no_grad()
def test_a_denoiser_with_conditions_of_its_own_for_each_branch() -> None:
    """Three samples, two prompts, one thing to move away from, encoded two and one times."""
    model, x = prefix(), inputs()
    texts = Condition(x["text"][:2], x["mask"][:2])
    nothing = Condition(x["text"][2:], x["mask"][2:])
    index = {"full": torch.tensor([0, 1, 1]), "no_text": torch.tensor([0, 0, 0])}
    results = []
    for cached in (True, False):
        denoiser = Denoiser(model, {"full": texts, "no_text": nothing}, index, cached)
        denoiser.plan([1.0, 0.5])
        results.append(
            [
                denoiser.velocity(("full", "no_text"), x["latents"], 1.0),
                denoiser.velocity(("full",), x["latents"], 0.5),
                denoiser.velocity(("no_text",), x["latents"], 0.25),  # a level that wasn't planned
            ]
        )
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        for branch in one:
            torch.testing.assert_close(one[branch], other[branch], atol=1e-5, rtol=0)


@torch.no_grad()
def test_finished_texts_can_be_left_out() -> None:
    model, x = prefix(aligned_source=False), inputs()
    condition = Condition(x["text"], x["mask"], (x["source"],))
    embeds, positions = x["text"].flip(1), torch.ones(3, 6, dtype=torch.bool)
    positions[1] = False
    for cached in (True, False):
        denoiser = Denoiser(model, {"full": condition}, torch.arange(3), cached)
        whole = denoiser.logits(("full",), embeds, positions)["full"]
        part = denoiser.logits(("full",), embeds[[0, 2]], positions[[0, 2]], rows=(0, 2))["full"]
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_prompt_lengths_in_one_bucket_share_their_compilations() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    plain, counter = prefix(), CompileCounter()
    x = inputs()
    compiled = copy.deepcopy(plain)
    compiled.compile_for_inference(bucket=8, backend=counter)
    counts = []
    for length in (2, 3, 5, 6):
        condition = Condition(x["text"][:, :length], torch.ones(3, length, dtype=torch.bool), (x["source"],))
        velocity = [
            Denoiser(one, {"full": condition}, torch.arange(3), True).velocity(("full",), x["latents"], 0.5)["full"]
            for one in (compiled, plain)
        ]
        torch.testing.assert_close(*velocity, atol=1e-5, rtol=0)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[-1] == counts[0], f"compilations after each prompt: {counts}"
    torch._dynamo.reset()


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_feed_forward_is_the_same_without_gradients(activation: str) -> None:
    """Without gradients it works in place: on memory of its own, never on its input."""
    torch.manual_seed(0)
    layer, x = FeedForward(24, 48, activation), torch.randn(2, 5, 24)
    kept, expected = x.clone(), layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert torch.equal(x, kept)
