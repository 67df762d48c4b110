"""Operations and cached tokens of every task, counted exactly: a speed-up that is lost changes these numbers.

Nothing here is timed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from unialignment.benchmarking.counting import Sizes, count_flops
from unialignment.benchmarking.models import build
from unialignment.benchmarking.suite import expected_step_flops
from unialignment.benchmarking.workloads import Case, ours, published, standard
from unialignment.model.transformer import UniAlignmentTransformer

CASES = [
    standard("generate", "tiny", 64),
    standard("generate", "tiny", 64, guidance=1.0),
    standard("generate", "tiny", 128, batch=3),
    *(standard("edit", "tiny", 64, count) for count in (1, 2, 3, 4)),
    standard("caption", "tiny", 64),
    standard("caption", "tiny", 64, batch=3),
    standard("answer", "tiny", 64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} guidance {case.guidance:g}")
def test_a_step_takes_what_its_target_tokens_cost_and_no_more(case: Case) -> None:
    way = ours(case)
    state = way.prepare()
    way.step(state, 0)  # the first text step finds out what time zero contributes
    assert count_flops(lambda: way.step(state, 1)) == expected_step_flops(case)


@pytest.mark.parametrize("modulation", ["block", "shared"])
@torch.no_grad()
def test_prefill_and_time_take_what_the_formula_says(modulation: str) -> None:
    model = UniAlignmentTransformer(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, vocab_size=40,
        joint_attention_dim=24, pos_embed_max_size=8, attention_mode="prefix", modulation=modulation,
        aligned_source=modulation == "shared",
    ).eval()  # fmt: skip
    sizes, picture, text = Sizes.of(model.config), torch.randn(1, 4, 8, 8), torch.randn(1, 6, 24)
    assert count_flops(lambda: model.prefill(text_embeds=text)) == sizes.prefill(6)
    assert count_flops(lambda: model.prefill(text_embeds=text, images=[picture])) == sizes.prefill(6, (16,))
    assert count_flops(lambda: model.prefill(images=[picture] * 2)) == sizes.prefill(0, (16, 16))
    assert count_flops(lambda: model.time_modulation("image", torch.zeros(5))) == sizes.time(5)


def test_attention_is_counted() -> None:
    """PyTorch's own registry leaves the CPU's fused attention out."""
    q = torch.randn(1, 2, 6, 8)
    kv = torch.randn(1, 2, 10, 8)
    expected = 2 * 2 * 2 * 6 * 10 * 8
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, kv, kv)) == expected
    mask = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    run = lambda: torch.nn.functional.scaled_dot_product_attention(q, kv, kv, attn_mask=mask)  # noqa: E731
    assert count_flops(run) == expected


def test_sources_cost_attention_only() -> None:
    """At the size of the acceptance (256 tokens, width 512): by count, as no clock is involved."""
    with torch.device("meta"):
        sizes = Sizes.of(UniAlignmentTransformer(num_layers=8, num_attention_heads=8, attention_mode="prefix").config)
    plain = sizes.image_step(256, 32)
    assert sizes.image_step(256, 32 + 256) / plain < 1.15
    assert sizes.image_step(256, 32 + 4 * 256) / plain < 1.5


def test_the_published_way_recomputes_what_ours_keeps() -> None:
    def flops(way: Any) -> int:
        state = way.prepare()
        way.step(state, 0)
        return count_flops(lambda: way.step(state, 1))

    case = standard("edit", "tiny", 64, 4)
    assert flops(published(case)) > 4 * flops(ours(case))
    case = standard("caption", "tiny", 128)
    assert flops(published(case)) > 2 * flops(ours(case))


# ------------------------------------------------------------------------------------------------ through the pipeline


class Watch:
    """Tokens that went through the blocks, and what was encoded, while a pipeline ran."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefilled = Counter[str]()
        self.cached: list[int] = []
        self.steps: list[int] = []
        model = pipe.transformer
        prefill, denoise = model.prefill, model.denoise

        def watched_prefill(**given: Any) -> Any:
            cache = prefill(**given)
            self.prefilled["conditions"] += cache.batch_size
            self.prefilled["calls"] += 1
            return cache

        def watched_denoise(cache: Any, **given: Any) -> Any:
            target = given["latents"] if given.get("latents") is not None else given["text_embeds"]
            self.cached.append(cache.length)
            self.steps.append(target.shape[0])
            assert cache.room is None or cache.room[0][0].shape[0] == cache.batch_size
            assert given.get("modulation") is not None, "the time's share is computed anew at every step"
            return denoise(cache, **given)

        monkeypatch.setattr(model, "prefill", watched_prefill)
        monkeypatch.setattr(model, "denoise", watched_denoise)


SEEDS = [torch.Generator().manual_seed(seed) for seed in range(4)]
PICTURES = [torch.randint(0, 255, (32, 32, 3), generator=seed).byte().numpy() for seed in SEEDS]


@pytest.fixture
def watch(tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(tiny_pipeline, monkeypatch)


def test_many_samples_of_a_prompt_encode_it_once(tiny_pipeline: Any, watch: Watch) -> None:
    tiny_pipeline.generate("a dog", num_images_per_prompt=5, num_inference_steps=3, guidance_scale=2.0, seed=0)
    assert watch.prefilled == {"conditions": 2, "calls": 2}
    assert watch.steps == [10, 10, 10]


def test_prompts_share_what_they_are_guided_away_from(tiny_pipeline: Any, watch: Watch) -> None:
    tiny_pipeline.generate(["a dog", "a cat", "the dog"], num_inference_steps=2, guidance_scale=2.0, seed=0)
    assert watch.prefilled["conditions"] == 4
    assert watch.steps == [6, 6]


def test_outside_the_interval_one_branch_runs(tiny_pipeline: Any, watch: Watch) -> None:
    tiny_pipeline.generate("a dog", num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.4, 0.8), seed=0)
    assert watch.steps == [1, 2, 2, 1]


def test_sources_are_cached_tokens(tiny_pipeline: Any, watch: Watch) -> None:
    tiny_pipeline.compose("a dog and a cat", PICTURES[:3], num_inference_steps=2, guidance_scale=2.0, seed=0)
    tokens = (tiny_pipeline.transformer.config.sample_size // tiny_pipeline.transformer.config.patch_size) ** 2
    assert watch.prefilled["calls"] == 2
    assert all(3 * tokens < length <= 3 * tokens + 16 for length in watch.cached)


def test_different_pictures_are_captioned_together(tiny_pipeline: Any, watch: Watch) -> None:
    tiny_pipeline.caption(PICTURES, num_inference_steps=3, seed=0)
    assert watch.prefilled == {"conditions": 4, "calls": 1}
    assert watch.steps[0] == 4
    assert len(watch.steps) <= 3


def test_one_picture_with_many_questions_is_encoded_by_the_autoencoder_once(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = tiny_pipeline.autoencoder.encode
    monkeypatch.setattr(tiny_pipeline.autoencoder, "encode", lambda x: seen.append(len(x)) or encode(x))
    tiny_pipeline.answer(PICTURES[0], ["what is the dog", "what is the cat"], num_inference_steps=1, seed=0)
    assert seen == [1]


def test_finished_texts_leave_the_batch(tiny_pipeline: Any, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps of one and of three words: after a step of one word each, only the second text goes on."""
    texts = ["the dog with a ___ and the cat", "the ___ with a ___ and the ___"]
    together = tiny_pipeline.infill(PICTURES[:2], texts, num_inference_steps=3, seed=0)
    assert watch.steps == [2, 1, 1]
    for picture, text, expected in zip(PICTURES, texts, together.texts, strict=False):
        assert tiny_pipeline.infill(picture, text, num_inference_steps=3, seed=0).texts == [expected]


@pytest.mark.parametrize("size", ["tiny", "nano"])
def test_random_models_share_their_weights_between_modes(size: str) -> None:
    prefix, joint = build(size).state_dict(), build(size, "joint").state_dict()
    assert all(torch.equal(prefix[name], value) for name, value in joint.items())
