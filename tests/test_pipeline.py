from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unialignment.conditioning import Denoiser
from unialignment.errors import CheckpointError, InputError
from unialignment.metadata import read_metadata
from unialignment.pipeline import UniAlignmentPipeline, load
from unialignment.tasks import TASKS, Task, TaskRegistry

PROMPTS = ("the dog", "a red cat with the apple on a blue background", "cat and dog and apple and dog")
GAPS = ("a ___ on the [MASK]", "the [MASK] dog with a ___ and the ___", "the cat is ___")
EACH_KIND = [(name, kind) for name in TASKS.names for kind in TASKS.get(name).kinds]


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return image.resize(size, Image.Resampling.BICUBIC)


def inputs(name: str, kind: str, count: int = 3) -> list[tuple[str | None, list[Image.Image] | None]]:
    """Different inputs for any task, by its declaration alone."""
    task = TASKS.get(name)
    made = []
    for i in range(count):
        prompt = GAPS[i] if task.gaps else PROMPTS[i] if task.needs_prompt(kind) or name == "generate" else None
        sources = min(task.max_sources, task.min_sources + i)
        made.append((prompt, [picture(10 * i + j) for j in range(sources)] or None))
    return made


def call(pipe: UniAlignmentPipeline, name: str, kind: str, given: list, **options):
    """Run a task on several inputs and return (result, final latents in order of samples)."""
    prompts = [prompt for prompt, _ in given]
    sources = [images for _, images in given]
    final: dict[int, torch.Tensor] = {}

    def watch(_, step, timestep, tensors):
        for index, row in zip(tensors["indices"], tensors.get("latents", tensors.get("ids")), strict=True):
            final[index] = row.clone()

    result = pipe.run(
        name,
        prompts if prompts[0] is not None else None,
        sources if sources[0] is not None else None,
        kind=kind,
        callback_on_step_end=watch,
        **options,
    )
    return result, [final[index] for index in sorted(final)]


def options_for(name: str) -> dict:
    if TASKS.get(name).target == "text":
        return {"temperature": 1.0}
    solver = "stochastic" if name == "compose" else "euler"
    return {"num_inference_steps": 3, "guidance_scale": 2.5, "image_guidance_scale": 1.5, "solver": solver}


@pytest.mark.parametrize(("name", "kind"), EACH_KIND)
def test_a_batch_equals_its_samples_one_by_one(tiny_pipeline, name: str, kind: str):
    given = inputs(name, kind)
    options = options_for(name)
    together, latents = call(tiny_pipeline, name, kind, given, seed=[5, 6, 7], batch_size=2, **options)
    for index, one in enumerate(given):
        alone, (own,) = call(tiny_pipeline, name, kind, [one], seed=5 + index, **options)
        assert alone.seeds == [together.seeds[index]]
        if TASKS.get(name).target == "text":
            assert alone.texts[0] == together.texts[index]
        else:
            torch.testing.assert_close(own, latents[index], atol=1e-4, rtol=1e-4)
            difference = np.asarray(alone.images[0]).astype(int) - np.asarray(together.images[index])
            assert np.abs(difference).max() <= 1
    if TASKS.get(name).target == "image":
        assert not torch.allclose(latents[0], latents[1], atol=1e-2)


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every prediction that the model makes, in order."""
    seen: list[torch.Tensor] = []
    for method in ("velocity", "logits"):
        original = getattr(Denoiser, method)

        def record(self, *arguments, original=original):
            made = original(self, *arguments)
            seen.extend(value.clone() for value in made.values())
            return made

        monkeypatch.setattr(Denoiser, method, record)
    return seen


@pytest.mark.parametrize(("name", "kind"), EACH_KIND)
def test_cached_conditions_equal_uncached_ones(tiny_pipeline, name: str, kind: str, predictions: list):
    options = {"num_inference_steps": 3, "guidance_scale": 1.2, "image_guidance_scale": 1.1}
    runs = []
    for use_cache in (True, False):
        predictions.clear()
        call(tiny_pipeline, name, kind, inputs(name, kind), seed=3, use_cache=use_cache, **options)
        runs.append(list(predictions))
    assert len(runs[0]) == len(runs[1]) >= 3
    for cached, uncached in zip(*runs, strict=True):
        torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "kind"), EACH_KIND)
def test_conditions_matter(tiny_pipeline, name: str, kind: str, predictions: list):
    # Guards the two tests above: they would pass with a model that ignores what it is given.
    (prompt, sources), *_ = inputs(name, kind)

    def first_prediction(prompt, sources):
        predictions.clear()
        call(tiny_pipeline, name, kind, [(prompt, sources)], num_inference_steps=1, seed=1)
        return predictions[0]

    base = first_prediction(prompt, sources)
    if prompt is not None:
        other = "a ___ on the [MASK] apple" if TASKS.get(name).gaps else "apple"
        assert (base - first_prediction(other, sources)).abs().max() > 1e-4
    if sources is not None:
        assert (base - first_prediction(prompt, [picture(99)])).abs().max() > 1e-4


def test_a_caption_depends_on_its_picture(tiny_pipeline):
    texts = tiny_pipeline.caption([picture(i) for i in range(6)], temperature=1.0, seed=1).texts
    assert len(set(texts)) > 1


@pytest.mark.parametrize("name", TASKS.names)
def test_joint_models_run_every_task(joint_pipeline, name: str):
    given = inputs(name, TASKS.get(name).kinds[0], 2)
    result, _ = call(joint_pipeline, name, TASKS.get(name).kinds[0], given, seed=1, num_inference_steps=2)
    assert len(result) == 2
    assert joint_pipeline.embed_image(picture(0)).shape == joint_pipeline.embed_text("the dog").shape


@pytest.fixture(scope="module")
def joint_pipeline(make_tiny_pipeline):
    return make_tiny_pipeline(attention_mode="joint")


def test_several_pictures_of_one_prompt_have_seeds_of_their_own(tiny_pipeline):
    several = tiny_pipeline.generate("the dog", seed=40, num_images_per_prompt=3, num_inference_steps=2)
    assert several.seeds == [40, 41, 42]
    for image, seed in zip(several.images, several.seeds, strict=True):
        alone = tiny_pipeline.generate("the dog", seed=seed, num_inference_steps=2).images[0]
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(image)).max() <= 1
    assert several.images[0].tobytes() != several.images[1].tobytes()


def test_lists_of_seeds_and_order_of_results(tiny_pipeline):
    result = tiny_pipeline.generate(["the dog", "a cat"], seed=[1, 9], num_images_per_prompt=2, num_inference_steps=1)
    assert result.prompts == ["the dog", "the dog", "a cat", "a cat"]
    assert result.seeds == [1, 2, 9, 10]
    explicit = tiny_pipeline.generate("the dog", seed=[4, 3], num_images_per_prompt=2, num_inference_steps=1)
    assert explicit.seeds == [4, 3]


def test_without_a_seed_results_differ_and_can_be_repeated(tiny_pipeline):
    first, second = (tiny_pipeline.generate("the dog", num_inference_steps=1) for _ in range(2))
    assert first.seeds != second.seeds
    again = tiny_pipeline.generate("the dog", seed=first.seeds[0], num_inference_steps=1)
    assert again.images[0].tobytes() == first.images[0].tobytes()


def test_one_condition_is_encoded_once(tiny_pipeline, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    original = tiny_pipeline.transformer.prefill

    def count(**arguments):
        rows.append(arguments["text_embeds"].shape[0])
        return original(**arguments)

    monkeypatch.setattr(tiny_pipeline.transformer, "prefill", count)
    tiny_pipeline.edit(
        "replace the dog", picture(0), num_images_per_prompt=5, num_inference_steps=4, guidance_scale=2.0
    )
    assert rows == [1, 1]


def test_guidance_of_one_takes_one_pass_and_ignores_the_negative_prompt(tiny_pipeline, monkeypatch):
    calls: list[tuple] = []
    original = Denoiser.velocity

    def record(self, branches, *arguments):
        calls.append(branches)
        return original(self, branches, *arguments)

    monkeypatch.setattr(Denoiser, "velocity", record)
    options = {"num_inference_steps": 4, "seed": 0}
    plain = tiny_pipeline.generate("the dog", guidance_scale=1.0, **options)
    negative = tiny_pipeline.generate("the dog", guidance_scale=1.0, negative_prompt="cat", **options)
    assert set(calls) == {("full",)}
    assert plain.images[0].tobytes() == negative.images[0].tobytes()
    guided = tiny_pipeline.generate("the dog", guidance_scale=4.0, **options)
    against = tiny_pipeline.generate("the dog", guidance_scale=4.0, negative_prompt="cat", **options)
    assert len({plain.images[0].tobytes(), guided.images[0].tobytes(), against.images[0].tobytes()}) == 3
    calls.clear()
    tiny_pipeline.generate("the dog", guidance_scale=4.0, guidance_interval=(0.3, 0.8), **options)
    assert calls == [("full",), ("full", "no_text"), ("full", "no_text"), ("full",)]
    calls.clear()
    tiny_pipeline.edit("red", picture(0), guidance_scale=4.0, image_guidance_scale=1.5, num_inference_steps=1)
    assert calls == [("full", "no_text", "nothing")]


def test_best_of_keeps_the_most_similar(tiny_pipeline):
    given = [("the dog", None)]
    every, latents = call(tiny_pipeline, "generate", "", given, seed=0, num_images_per_prompt=6, num_inference_steps=2)
    similarity = tiny_pipeline.embed_latents(torch.stack(latents)) @ tiny_pipeline.embed_text("the dog").T
    best = tiny_pipeline.generate("the dog", seed=0, best_of=6, num_images_per_prompt=2, num_inference_steps=2)
    assert best.seeds == [every.seeds[int(i)] for i in similarity[:, 0].argsort(descending=True)[:2]]
    assert best.scores == sorted(best.scores, reverse=True)
    assert every.scores is None


def test_prompts_are_reworded_by_each_pictures_own_seed(tiny_pipeline, tmp_path: Path):
    options = {"num_inference_steps": 2, "rewrite": True}
    result = tiny_pipeline.generate(["the dog", "a cat"], seed=[3, 8], num_images_per_prompt=2, **options)
    said = tiny_pipeline.rewrite(["the dog", "the dog", "a cat", "a cat"], seed=[3, 4, 8, 9]).texts
    assert result.revised_prompts == said and len(set(said)) > 2
    assert result.prompts == ["the dog", "the dog", "a cat", "a cat"]
    drawn = tiny_pipeline.generate(said[1], seed=4, num_inference_steps=2)
    again = tiny_pipeline.generate("the dog", seed=4, **options)
    for one in (drawn, again):
        assert np.abs(np.asarray(one.images[0]).astype(int) - np.asarray(result.images[1], dtype=int)).max() <= 1
    (path,) = again.save(tmp_path / "dog.png")
    assert read_metadata(path)["revised_prompt"] == said[1]
    assert drawn.revised_prompts is None and "revised_prompt" not in drawn.metadata()[0]


def test_rewriting_is_for_prompts_alone(tiny_pipeline):
    nothing = tiny_pipeline.generate(None, seed=1, num_inference_steps=2, rewrite=True)
    plain = tiny_pipeline.generate(None, seed=1, num_inference_steps=2)
    assert nothing.revised_prompts is None
    assert np.array_equal(np.asarray(nothing.images[0]), np.asarray(plain.images[0]))
    with pytest.raises(InputError, match="edit has pictures"):
        tiny_pipeline.edit("red", picture(1), rewrite=True)
    with pytest.raises(InputError, match="True or False"):
        tiny_pipeline.generate("the dog", rewrite="yes")


def test_texts_can_be_guided_away_from_what_they_would_be_without_the_picture(tiny_pipeline):
    options = {"seed": 1, "num_inference_steps": 4}
    plain = tiny_pipeline.answer(picture(1), "what is the dog", **options)
    guided = tiny_pipeline.answer(picture(1), "what is the dog", image_guidance_scale=8.0, **options)
    assert plain.texts != guided.texts
    assert guided.settings["image_guidance_scale"] == 8.0


def test_callbacks_see_every_step_and_may_replace_latents(tiny_pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        assert pipe is tiny_pipeline
        seen.append((step, round(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    result = tiny_pipeline.generate("the dog", num_inference_steps=4, callback_on_step_end=watch)
    assert seen == [(i, 1000 - 250 * i, (1, 4, 8, 8)) for i in range(4)]
    zero = tiny_pipeline.autoencoder.decode(torch.zeros(1, 4, 8, 8))
    expected = ((zero[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    np.testing.assert_array_equal(np.asarray(result.images[0]), expected)
    with pytest.raises(InputError, match="callback"):
        tiny_pipeline.generate("the dog", callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_callbacks_of_texts_see_them_grow(tiny_pipeline):
    masked = []

    def watch(pipe, step, timestep, tensors):
        masked.append(int((tensors["ids"] == pipe.tokenizer.mask_token_id).sum()))

    tiny_pipeline.caption(picture(0), max_length=12, num_inference_steps=4, callback_on_step_end=watch)
    assert masked[-1] == 0
    assert masked == sorted(masked, reverse=True)
    assert 1 <= len(masked) <= 4


def test_infill_keeps_the_given_words(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    result, (ids,) = call(tiny_pipeline, "infill", "", [("the ___ is on a [MASK] background", [picture(0)])])
    given = tokenizer.encode(["the [MASK] is on a [MASK] background"], gaps=True)[0][0]
    gaps = given == tokenizer.mask_token_id
    assert int(gaps.sum()) == 2
    assert torch.equal(ids[: len(given)][~gaps], given[~gaps])
    assert not set(ids[: len(given)].tolist()) & {tokenizer.mask_token_id, tokenizer.pad_token_id}
    assert set(ids[len(given) :].tolist()) == {tokenizer.pad_token_id}
    assert result.texts[0].endswith("background")


def test_a_long_text_with_gaps_gets_a_longer_canvas_whatever_its_batch(tiny_pipeline):
    texts = ["the ___ dog", "the dog and " * 14 + "the ___"]
    together = tiny_pipeline.infill(picture(0), texts)
    assert together.texts == [tiny_pipeline.infill(picture(0), text).texts[0] for text in texts]
    assert together.texts[1].count("dog") >= 14


@pytest.mark.parametrize("decoding", ["confidence", "ancestral"])
def test_sampled_texts_repeat_with_their_seed(tiny_pipeline, decoding: str):
    def write(seed: int) -> str:
        options = {"temperature": 1.0, "top_p": 0.95, "decoding": decoding, "max_length": 12}
        return tiny_pipeline.caption(picture(0), seed=seed, **options).texts[0]

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(6)}) > 1


def test_a_prompt_in_own_words_goes_past_the_template(tiny_pipeline):
    options = {"seed": 1, "num_inference_steps": 1}
    by_kind = tiny_pipeline.perceive(picture(0), "segment", "the dog", **options)
    in_words = tiny_pipeline.perceive(picture(0), prompt="segment the dog", **options)
    other = tiny_pipeline.perceive(picture(0), prompt="the dog", **options)
    assert by_kind.images[0].tobytes() == in_words.images[0].tobytes() != other.images[0].tobytes()
    assert (by_kind.settings["kind"], in_words.settings["kind"]) == ("segment", None)
    template = TASKS.get("control").templates["depth"].format(prompt="the dog")
    pair = [
        tiny_pipeline.control("the dog", picture(0), "depth", **options),
        tiny_pipeline.control(template, picture(0), **options),
    ]
    assert pair[0].images[0].tobytes() == pair[1].images[0].tobytes()


def test_heun_and_sizes(tiny_pipeline):
    euler, heun = (
        tiny_pipeline.generate("the dog", seed=1, num_inference_steps=3, solver=solver, width=24, height=48)
        for solver in ("euler", "heun")
    )
    assert euler.images[0].size == (24, 48)
    assert euler.images[0].tobytes() != heun.images[0].tobytes()
    assert heun.settings["solver"] == "heun"


def test_sources_of_any_shape_are_fitted(tiny_pipeline):
    wide = picture(0, (90, 30))
    crop, pad = (tiny_pipeline.edit("red", wide, seed=1, num_inference_steps=1, fit=fit) for fit in ("crop", "pad"))
    assert crop.images[0].size == (32, 32)
    assert pad.images[0].size == (32, 11)  # the padding is cut off again, so that the result fits its source
    whole = tiny_pipeline.compose("red", [wide], seed=1, num_inference_steps=1, fit="pad")
    assert whole.images[0].size == (32, 32)


def test_one_picture_is_shared_by_many_questions_and_one_prompt_by_many_pictures(tiny_pipeline):
    answers = tiny_pipeline.answer(picture(0), ["what is the dog", "what is on the cat"])
    assert answers.prompts == ["what is the dog", "what is on the cat"]
    assert len(tiny_pipeline.edit("red", [picture(0), picture(1)], num_inference_steps=1)) == 2


def test_saved_pictures_tell_how_to_repeat_them(tiny_pipeline, tmp_path: Path):
    result = tiny_pipeline.generate(["the dog", "a cat"], seed=8, num_inference_steps=2, negative_prompt="red")
    paths = result.save(tmp_path / "picture.png")
    assert [path.name for path in paths] == ["picture-1.png", "picture-2.png"]
    facts = read_metadata(paths[1])
    assert (facts["prompt"], facts["seed"], facts["model"], facts["task"]) == ("a cat", 8, "tiny", "generate")
    again = tiny_pipeline.run(facts["task"], facts["prompt"], seed=facts["seed"], **facts["settings"])
    difference = np.asarray(again.images[0]).astype(int) - np.asarray(Image.open(paths[1]))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_model_survives_saving(tiny_pipeline, tmp_path: Path, stored: str):
    tiny_pipeline.save_pretrained(tmp_path / "model", dtypes={"transformer": stored})
    loaded = load(tmp_path / "model", device="cpu")
    assert loaded.name == "tiny"
    assert loaded.dtype == torch.float32
    arguments = {"seed": 1, "num_inference_steps": 2}
    ours, theirs = (p.generate("the dog", **arguments).images[0] for p in (tiny_pipeline, loaded))
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()
    assert difference == 0 if stored == "float32" else difference < 60
    assert loaded.caption(ours).texts == tiny_pipeline.caption(ours).texts or stored != "float32"


def test_bfloat16_arithmetic_runs_every_target(tiny_folder: Path):
    pipe = load(tiny_folder, device="cpu", dtype="bfloat16")
    assert pipe.dtype == torch.bfloat16
    assert len(pipe.edit("red", picture(0), num_inference_steps=2)) == 1
    assert len(pipe.caption(picture(0))) == 1
    assert pipe.embed_image(picture(0)).dtype == torch.float32


def test_models_may_bring_their_own_sampler_defaults(tiny_pipeline, tmp_path: Path):
    pipe = UniAlignmentPipeline(
        tiny_pipeline.transformer,
        tiny_pipeline.text_embedder,
        tiny_pipeline.autoencoder,
        tiny_pipeline.tokenizer,
        sampling={"generate": {"num_inference_steps": 2, "shift": 3.0}},
    )
    pipe.save_pretrained(tmp_path / "model")
    settings = load(tmp_path / "model").generate("the dog", shift=2.0).settings
    assert (settings["num_inference_steps"], settings["shift"]) == (2, 2.0)
    assert settings["guidance_scale"] == TASKS.get("generate").sampling["guidance_scale"]


def test_a_new_task_is_one_declaration(tiny_pipeline):
    registry = TaskRegistry()
    registry.register(
        Task("blend", "mix two pictures", "image", min_sources=2, max_sources=2, templates={"": "next to {prompt}"})
    )
    registry.register(Task("title", "name a picture", "text", "none", 1, 1, templates={"": "what is"}, target_length=4))
    pipe = UniAlignmentPipeline(
        tiny_pipeline.transformer,
        tiny_pipeline.text_embedder,
        tiny_pipeline.autoencoder,
        tiny_pipeline.tokenizer,
        tasks=registry,
    )
    assert len(pipe.blend("the dog", [picture(0), picture(1)], num_inference_steps=1)) == 1
    assert len(pipe.title(images=[picture(0), picture(1)])) == 2
    with pytest.raises(InputError, match="takes 2 pictures"):
        pipe.blend("the dog", [picture(0)])
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pipe.nonsense  # noqa: B018


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(tiny_pipeline):
    pictures, texts = [picture(i) for i in range(3)], list(PROMPTS)
    for embed, items in ((tiny_pipeline.embed_image, pictures), (tiny_pipeline.embed_text, texts)):
        vectors = embed(items, batch_size=2)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(vectors, torch.cat([embed(item) for item in items]), atol=1e-5, rtol=1e-4)
        assert vectors[0] @ vectors[1] < 0.9999


def test_progress_bars_are_shown_when_asked(tiny_pipeline, capsys: pytest.CaptureFixture[str]):
    tiny_pipeline.generate("the dog", num_inference_steps=2)
    assert capsys.readouterr().err == ""
    tiny_pipeline.generate("the dog", num_inference_steps=2, progress=True)
    assert "generate" in capsys.readouterr().err


def test_pictures_may_be_paths_bytes_and_arrays(tiny_pipeline, tmp_path: Path):
    image = picture(0)
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), np.asarray(image)]
    vectors = tiny_pipeline.embed_image(forms)
    torch.testing.assert_close(vectors, vectors[:1].expand(5, -1), atol=1e-5, rtol=1e-4)


def test_components_of_two_models_are_refused(tiny_pipeline):
    from unialignment.model.autoencoder import PixelAutoencoder

    with pytest.raises(CheckpointError, match="latent channels"):
        UniAlignmentPipeline(
            tiny_pipeline.transformer, tiny_pipeline.text_embedder, PixelAutoencoder(), tiny_pipeline.tokenizer
        )


def test_unknown_devices_and_dtypes_are_refused(tiny_folder: Path):
    for options in ({"device": "abacus"}, {"device": "cuda:77"}, {"dtype": "int3"}):
        with pytest.raises(InputError, match="|".join(options)) as caught:
            load(tiny_folder, **options)
        assert "\n" not in str(caught.value)
