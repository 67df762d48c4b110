"""Batching and the objective: what is grouped with what, what is masked, paired, dropped, and how losses add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unialignment.data.sample import Sample
from unialignment.diffusion import FlowPath, MaskedPath
from unialignment.errors import ConfigError, InputError
from unialignment.model.autoencoder import PixelAutoencoder
from unialignment.model.text import TokenEmbedder
from unialignment.model.tokenizer import TextTokenizer, encode_conditions
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.training.batching import LONG_PROMPT, collate, images_to_tensor
from unialignment.training.objective import Objective, ObjectiveSettings

TEXTS = ["a red dog on a blue background", "a cat", "remove the dog", "what is this?", "segment the cat"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS * 20, vocab_size=128)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def sample(task: str, index: int = 0, pair: int | None = None) -> Sample:
    shared = {"pair_id": pair}
    if task == "generate":
        return Sample(task, prompt=TEXTS[index % 2], target_image=picture(index), **shared)
    if task in ("edit", "perceive"):
        return Sample(task, prompt=TEXTS[2], sources=(picture(index),), target_image=picture(index + 100))
    if task == "caption":
        return Sample(task, sources=(picture(index),), target_text=TEXTS[index % 2], **shared)
    return Sample("answer", prompt=TEXTS[3], sources=(picture(index),), target_text="a cat")


def objective(tokenizer: TextTokenizer, mode: str = "prefix", **settings: object) -> Objective:
    torch.manual_seed(0)
    transformer = UniAlignmentTransformer(
        sample_size=16,
        patch_size=8,
        in_channels=3,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pos_embed_max_size=4,
        vocab_size=tokenizer.vocab_size,
        attention_mode=mode,
    )
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    embedder = TokenEmbedder(tokenizer.vocab_size, 24, 64)
    return Objective(
        transformer,
        embedder,
        PixelAutoencoder(),
        tokenizer,
        FlowPath(),
        MaskedPath(tokenizer.mask_token_id),
        ObjectiveSettings(**{"intrinsic": 0.0, **settings}),  # type: ignore[arg-type]
    )


# ------------------------------------------------------------------------------------------------------ batching


def test_samples_of_one_signature_share_a_batch(tokenizer: TextTokenizer) -> None:
    mixed = [sample(t, i) for i, t in enumerate(("generate", "edit", "perceive", "caption", "answer", "generate"))]
    batches = collate(mixed, tokenizer)
    assert [(b.target, b.tasks) for b in batches] == [
        ("image", ("generate", "generate")),
        ("image", ("edit", "perceive")),
        ("text", ("answer",)),
        ("text", ("caption",)),
    ]


def test_a_few_long_prompts_form_a_batch_of_their_own(tokenizer: TextTokenizer) -> None:
    def drawn(*prompts: str) -> list[tuple[str, ...]]:
        samples = [Sample("generate", prompt=prompt, target_image=picture(i)) for i, prompt in enumerate(prompts)]
        batches = collate(samples, tokenizer)
        assert all(batch.prompt_ids.shape[1] - batch.prompt_mask.sum(1).max() < 8 for batch in batches)
        return [tuple(tokenizer.decode(batch.prompt_ids)) for batch in batches]

    short, long = TEXTS[0], " ".join([TEXTS[0]] * 8)
    assert len(long) > LONG_PROMPT
    assert drawn(short, long, TEXTS[1], "") == [(short, TEXTS[1], ""), (long,)]
    assert drawn(long, short, long) == [(long, short, long)]  # most are long
    middling = f"{short} {short}"
    assert drawn(short, middling, short) == [(short, middling, short)]  # little would be saved


def test_every_condition_ends_in_one_visible_end_token(tokenizer: TextTokenizer) -> None:
    ids, mask = encode_conditions(tokenizer, [TEXTS[0], "", TEXTS[1]], bucket=8)
    assert ids.shape[1] % 8 == 0
    assert mask[1].sum() == 1
    lengths = mask.sum(1).tolist()
    for row, length in enumerate(lengths):
        assert int(ids[row, length - 1]) == tokenizer.pad_token_id
        assert bool((ids[row, : length - 1] != tokenizer.pad_token_id).all())
    assert tokenizer.decode(ids) == [TEXTS[0], "", TEXTS[1]]


def test_only_the_gaps_of_an_infill_sample_may_be_masked(tokenizer: TextTokenizer) -> None:
    words = TEXTS[0].split()
    words[2] = words[6] = "[MASK]"
    infill = Sample("infill", prompt=" ".join(words), sources=(picture(0),), target_text=TEXTS[0])
    (batch,) = collate([infill], tokenizer)
    assert batch.maskable is not None
    assert batch.maskable[0].nonzero().flatten().tolist() == [2, 6]
    assert batch.prompt_mask.sum() == 1
    wrong = Sample("infill", prompt="a [MASK] cat", sources=(picture(0),), target_text=TEXTS[0])
    with pytest.raises(InputError, match="must be its target text"):
        collate([wrong], tokenizer)


def test_what_a_text_gives_is_never_masked(tokenizer: TextTokenizer) -> None:
    text = TEXTS[0]
    start = text.index("dog")
    given = Sample("caption", sources=(picture(0),), target_text=text, given=((start, start + 3), (0, 1)))
    (batch,) = collate([given, Sample("caption", sources=(picture(1),), target_text=text)], tokenizer)
    assert batch.maskable is not None and batch.target_ids is not None
    assert tokenizer.decode(batch.target_ids[:1, ~batch.maskable[0]]) == ["a dog"]
    assert bool(batch.maskable[1].all())


def test_prompt_dropout_empties_image_prompts_only_and_unpairs_them(tokenizer: TextTokenizer) -> None:
    mixed = [sample("generate", i, pair=i) for i in range(4)] + [sample("answer", i) for i in range(4)]
    image, text = collate(mixed, tokenizer, prompt_dropout=1.0, rng=np.random.default_rng(0))
    assert image.prompt_mask.sum(1).tolist() == [1] * 4
    assert image.pair_ids.tolist() == [-1] * 4
    assert text.prompt_mask.sum(1).min() > 1
    with pytest.raises(InputError, match="pass rng"):
        collate(mixed, tokenizer, prompt_dropout=0.5)


def test_pictures_keep_their_values() -> None:
    extremes = np.zeros((2, 2, 3), np.uint8)
    extremes[0, 0, 0] = 255
    tensor = images_to_tensor([extremes])
    assert float(tensor.max()) == 1
    assert float(tensor.min()) == -1
    assert float(tensor[0, 0, 0, 0]) == 1


def test_incomplete_samples_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="generate sample lacks its target_image"):
        collate([Sample("generate", prompt="a cat")], tokenizer)


def test_each_picture_size_is_a_batch_of_its_own(tokenizer: TextTokenizer) -> None:
    different = [sample("generate"), Sample("generate", target_image=np.zeros((8, 8, 3), np.uint8))]
    batches = collate(different, tokenizer)
    sizes = [tuple(batch.target_images.shape) for batch in batches if batch.target_images is not None]
    assert sorted(sizes) == sorted((1, 3, *s.target_image.shape[:2]) for s in different)


# ----------------------------------------------------------------------------------------------------- objective


def test_the_total_is_the_weighted_sum_of_the_parts(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer, text=0.2, cross=0.05)
    mixed = [sample("generate", i, pair=i) for i in range(4)] + [sample("caption", i, pair=i) for i in range(4)]
    output = model(collate(mixed, tokenizer), torch.Generator().manual_seed(0))
    logs = output.logs
    expected = logs["loss/image"] + 0.2 * logs["loss/text"] + 0.05 * logs["loss/cross"]
    torch.testing.assert_close(output.loss.detach(), expected)
    assert set(logs) >= {"task/generate", "task/caption", "cross/accuracy"}


def test_every_sample_counts_the_same_whatever_its_batch(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer, cross=0.0)
    mixed = [sample("generate", i) for i in range(5)] + [sample("edit", 9)]
    logs = model(collate(mixed, tokenizer), torch.Generator().manual_seed(0)).logs
    torch.testing.assert_close(logs["loss/image"], (5 * logs["task/generate"] + logs["task/edit"]) / 6)


def test_task_weights_scale_their_samples(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer, cross=0.0)
    mixed = [sample("generate"), sample("edit")]
    logs = model(collate(mixed, tokenizer, task_weights={"edit": 3.0}), torch.Generator().manual_seed(0)).logs
    torch.testing.assert_close(logs["loss/image"], (logs["task/generate"] + 3 * logs["task/edit"]) / 2)


def test_contrastive_pairs_are_found_across_batches_by_id(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer)
    generated = [sample("generate", i, pair=i) for i in range(4)]
    captioned = [sample("caption", i, pair=i) for i in (3, 1, 7)]
    assert "loss/cross" in model(collate(generated + captioned, tokenizer)).logs
    unpaired = [sample("caption", i, pair=i) for i in (8, 9)]
    assert "loss/cross" not in model(collate(generated + unpaired, tokenizer)).logs


def test_condition_features_have_not_seen_their_pair(tokenizer: TextTokenizer) -> None:
    """The leak-free form: the text's embedding is the same whatever picture is being denoised."""
    model = objective(tokenizer).eval()
    first = [sample("generate", 0, pair=0), sample("generate", 1, pair=1)]
    other = [Sample("generate", s.prompt, target_image=picture(50 + i), pair_id=i) for i, s in enumerate(first)]
    with torch.no_grad():
        features = [model.batch_loss(collate(group, tokenizer)[0])[1].text_features for group in (first, other)]
    torch.testing.assert_close(*features, atol=0, rtol=0)


def test_intrinsic_losses_appear_with_teachers(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer, intrinsic=0.1, image_teacher_dim=6, text_teacher_dim=5)
    mixed = [sample("generate", i, pair=i) for i in range(3)] + [sample("caption", i, pair=i) for i in range(3)]
    teacher = {i: (torch.randn(6), torch.randn(5)) for i in range(3)}
    output = model(collate(mixed, tokenizer, teacher=teacher))
    assert {"loss/intrinsic_image", "loss/intrinsic_text"} <= set(output.logs)
    output.loss.backward()
    assert model.projectors["text"].fc[0].weight.grad is not None
    assert "loss/intrinsic_image" not in model(collate(mixed, tokenizer)).logs


def test_published_contrastive_form_in_joint_mode(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer, mode="joint", cross_form="published")
    mixed = [sample("generate", i, pair=i) for i in range(3)]
    assert "loss/cross" in model(collate(mixed, tokenizer)).logs
    with pytest.raises(ConfigError, match="needs attention_mode='prefix'"):
        objective(tokenizer, mode="joint", cross_form="condition")


def test_shared_draws_are_the_mean_over_separate_passes(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer, draws=3).eval()
    (batch,) = collate([sample("edit", i) for i in range(2)], tokenizer)
    with torch.no_grad():
        shared, output = model.batch_loss(batch, torch.Generator().manual_seed(5))
        target, sources = model._latents(batch)
        assert target is not None
        rows = torch.tensor([0, 0, 0, 1, 1, 1])
        generator = torch.Generator().manual_seed(5)
        path = model.flow.sample_path(target[rows], model.flow.sample_time(6, generator), generator)
        separate = model.transformer(
            text_embeds=model.text_embedder.embed(batch.prompt_ids, batch.prompt_mask)[rows],
            text_mask=batch.prompt_mask[rows],
            latents=path.noised,
            sources=[source[rows] for source in sources],
            timestep=path.timestep,
        )
    expected = model.flow.loss(separate.velocity, path).view(2, 3).mean(1)
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-5)
    assert output.image_features is not None
    assert output.image_features.shape[0] == 2
    torch.testing.assert_close(output.image_features, separate.image_features[[0, 3]], atol=1e-4, rtol=1e-4)
    (answers,) = collate([sample("answer", i) for i in range(2)], tokenizer)
    losses, read = model.batch_loss(answers, torch.Generator().manual_seed(5))
    assert losses.shape == (2,)
    assert read.text_features is not None
    assert read.text_features.shape[0] == 2
    with pytest.raises(ConfigError, match="draws > 1 needs"):
        objective(tokenizer, mode="joint", cross=0.0, draws=2)


def test_the_autoencoder_is_not_trained(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer)
    assert set(model.trainable()) == {"transformer", "text_embedder"}


def test_prompt_gap_is_zero_for_a_model_that_ignores_prompts(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer).eval()
    batches = collate([sample("generate", i) for i in range(4)], tokenizer)
    heard = model.prompt_gap(batches)
    assert {"gap/generate/0.95/right", "gap/generate/0.99/empty", "gap/generate/0.99/gap"} <= set(heard)
    assert heard["gap/generate/0.95/gap"] != 0
    # A picture that attends to nothing but itself can't hear its prompt.
    for block in model.transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn.to_out[0].weight)
        torch.nn.init.zeros_(block.attn.to_out[0].bias)
    deaf = model.prompt_gap(batches)
    assert deaf["gap/generate/0.95/gap"] == pytest.approx(0, abs=1e-6)


def test_a_tiny_model_learns_a_handful_of_pictures(tokenizer: TextTokenizer) -> None:
    model = objective(tokenizer)
    batches = collate([sample("generate", i) for i in range(2)] + [sample("answer", 3)], tokenizer)
    optimizer = torch.optim.AdamW(model.trainable().parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        output = model(batches, generator)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.logs["loss/text"]))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
