"""Training sees texts as the published model does: padded prompts, questions before their answers, one tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import unialignment
from unialignment.data.sample import Sample
from unialignment.model.layouts import load_model_tokenizer
from unialignment.model.tokenizer import TextTokenizer
from unialignment.training.batching import Batch, collate

PICTURE = np.zeros((64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokenizer(published_folder: Path) -> TextTokenizer:
    return load_model_tokenizer(published_folder)


def answers(tokenizer: TextTokenizer, *pairs: tuple[str, str]) -> Batch:
    samples = [Sample("answer", prompt=q, sources=(PICTURE,), target_text=a) for q, a in pairs]
    (batch,) = collate(samples, tokenizer)
    return batch


def test_the_run_keeps_the_tokenizer_of_the_model(
    tokenizer: TextTokenizer, published_folder: Path, tmp_path: Path
) -> None:
    pipe = unialignment.load(published_folder)
    tokenizer.save_pretrained(tmp_path / "run")
    pipe.save_pretrained(tmp_path / "ours")
    again = TextTokenizer.from_pretrained(tmp_path / "run")
    for other in (pipe.tokenizer, again, load_model_tokenizer(tmp_path / "ours")):
        assert other.fingerprint == tokenizer.fingerprint
        assert (other.prompt_length, other.question_first) == (256, True)


def test_prompts_are_padded_visibly(tokenizer: TextTokenizer) -> None:
    (batch,) = collate([Sample("generate", prompt="a red dog", target_image=PICTURE)], tokenizer)
    pipe_ids = tokenizer.encode(["a red dog"], 256)[0]
    assert torch.equal(batch.prompt_ids, pipe_ids) and bool(batch.prompt_mask.all())
    assert batch.question_lengths is None


def test_questions_lead_and_are_never_masked(tokenizer: TextTokenizer) -> None:
    pairs = [("what is red", "a red apple"), ("what is next to the dog", "the cat")]
    batch = answers(tokenizer, *pairs)
    assert batch.prompt_ids.shape == (2, 0) and batch.question_lengths is not None
    assert batch.target_ids is not None and batch.maskable is not None
    for row, (question, answer) in enumerate(pairs):
        ids = tokenizer.encode([question])[0][0]
        count = len(ids)
        assert int(batch.question_lengths[row]) == count
        assert torch.equal(batch.target_ids[row, :count], ids)
        assert not bool(batch.maskable[row, :count].any()) and bool(batch.maskable[row, count:].all())
        assert tokenizer.decode(batch.without_questions(batch.target_ids))[row] == answer
    # The same canvas as at inference: question, then as many tokens as the task's text has.
    assert batch.target_ids.shape[1] == int(batch.question_lengths.max()) + 8


def test_captions_have_no_text_condition_and_gaps_stay_the_only_target(tokenizer: TextTokenizer) -> None:
    (batch,) = collate([Sample("caption", sources=(PICTURE,), target_text="a dog")], tokenizer)
    assert batch.prompt_ids.shape == (1, 0) and batch.target_ids is not None and batch.target_ids.shape == (1, 40)
    gaps = Sample("infill", prompt="a [MASK] dog", sources=(PICTURE,), target_text="a red dog")
    (batch,) = collate([gaps], tokenizer)
    assert batch.maskable is not None and batch.maskable[0].nonzero().flatten().tolist() == [1]


def test_the_model_trains_on_such_a_batch(tokenizer: TextTokenizer, published_folder: Path) -> None:
    pipe = unialignment.load(published_folder)
    batch = answers(tokenizer, ("what is red", "a red apple"))
    assert batch.target_ids is not None and batch.maskable is not None
    condition = pipe.text_embedder.embed(batch.prompt_ids, batch.prompt_mask)
    assert condition.shape == (1, 0, 48)
    masked = torch.where(batch.maskable, tokenizer.mask_token_id, batch.target_ids)
    inputs = {
        "text_embeds": pipe.text_embedder.embed(masked),
        "latents": pipe.autoencoder.encode(batch.sources[0]),
        **{"timestep": torch.zeros(1), "target": "text", "logit_positions": batch.maskable},
    }
    with_nothing = pipe.transformer(
        **inputs, condition_text_embeds=condition, condition_text_mask=batch.prompt_mask
    ).text_logits
    torch.testing.assert_close(with_nothing, pipe.transformer(**inputs).text_logits)
    with_nothing.square().mean().backward()
    assert pipe.transformer.text_proj_out.weight.grad.abs().sum() > 0


def test_a_run_starts_from_the_published_folder(
    published_folder: Path, repo_root: Path, tmp_path: Path, pack: object
) -> None:
    from rich.console import Console

    from unialignment.training.config import load_config
    from unialignment.training.loop import Trainer

    config = load_config(
        repo_root / "configs" / "tiny.yaml",
        [
            *(f"run.dir={tmp_path / 'run'}", "run.max_steps=2", "data.workers=0", f"model.initial={published_folder}"),
            *("text.max_length=256", "loss.cross_form=published", "logging.tensorboard=false", "logging.samples=false"),
            "mixture={generate: 1, edit: 1, compose: 1, answer: 1, perceive: 0, control: 0, caption: 0, infill: 0}",
        ],
    )
    start = unialignment.load(published_folder)
    pipe = unialignment.load(Trainer(config, Console(quiet=True)).train())
    assert (pipe.tokenizer.prompt_length, pipe.tokenizer.question_first) == (256, True)
    assert torch.equal(pipe.text_embedder.mask_embedding, start.text_embedder.mask_embedding)
    for name in ("transformer_blocks.2.ff_context.net.2.weight", "image_proj_out.weight", "text_proj_out.weight"):
        assert not torch.equal(pipe.transformer.state_dict()[name], start.transformer.state_dict()[name]), name
    assert len(pipe.generate("a red dog", seed=0, num_inference_steps=1).images) == 1


def test_what_the_model_sees_in_a_step(
    published_folder: Path, repo_root: Path, tmp_path: Path, pack: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from samples through objective to the transformer, in both kinds of training."""
    from rich.console import Console

    from unialignment.model.text import T5TextEmbedder
    from unialignment.model.transformer import UniAlignmentTransformer
    from unialignment.training.config import load_config
    from unialignment.training.loop import Trainer

    seen: list[dict[str, object]] = []
    embedded: list[torch.Tensor] = []
    forward, embed = UniAlignmentTransformer.forward, T5TextEmbedder.embed

    def watched(self: UniAlignmentTransformer, **given: object) -> object:
        seen.append(given)
        return forward(self, **given)

    def read(self: T5TextEmbedder, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        embedded.append(ids)
        return embed(self, ids, mask)

    monkeypatch.setattr(UniAlignmentTransformer, "forward", watched)
    monkeypatch.setattr(T5TextEmbedder, "embed", read)
    config = load_config(
        repo_root / "configs" / "tiny.yaml",
        [
            *(f"run.dir={tmp_path / 'run'}", "run.max_steps=1", "data.workers=0", f"model.initial={published_folder}"),
            *("text.max_length=256", "loss.cross=0", "logging.tensorboard=false", "logging.samples=false"),
            *("lora.rank=2", "prompt_dropout=0", "loss.intrinsic=0"),
            "mixture={generate: 2, edit: 1, answer: 3, caption: 0, compose: 0, perceive: 0, control: 0, infill: 0}",
        ],
    )
    trainer = Trainer(config, Console(quiet=True))
    batches, _ = micro = trainer.source()(0)
    trainer.step([micro])
    pictures = [given for given in seen if given.get("target", "image") == "image"]
    texts = [given for given in seen if given.get("target") == "text"]
    assert pictures and texts
    for given in pictures:
        prompts, mask = given["text_embeds"], given.get("text_mask")
        assert isinstance(prompts, torch.Tensor) and prompts.shape[1] == 256
        assert mask is None or bool(mask.all())  # the padding is seen
    (answer,) = [batch for batch in batches if batch.target == "text"]
    assert answer.question_lengths is not None and answer.target_ids is not None and answer.maskable is not None
    (ids,) = [ids for ids in embedded if ids.shape == answer.target_ids.shape]
    tokenizer = load_model_tokenizer(published_folder)
    open_ = ids == tokenizer.mask_token_id
    assert bool(open_.any()) and not bool((open_ & ~answer.maskable).any())
    for row, length in enumerate(answer.question_lengths.tolist()):
        assert length > 0 and torch.equal(ids[row, :length], answer.target_ids[row, :length])
    for given in texts:
        condition = given.get("condition_text_embeds")
        assert condition is None or condition.shape[1] == 0  # the question isn't said twice
        assert given["text_embeds"].shape[1] == ids.shape[1]
        positions = given["logit_positions"]
        assert positions is None or isinstance(positions, (torch.Tensor, tuple))


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.rank=2", "run.activation_checkpointing=true"),
        pytest.param(("lora.rank=2",), marks=pytest.mark.slow),
        pytest.param(("micro_batches=2",), marks=pytest.mark.slow),
        pytest.param(("lora.rank=2", "lora.base_precision=bf16", "run.precision=bf16"), marks=pytest.mark.slow),
    ],
    ids=["lora, checkpointing", "lora", "full weights", "lora, bf16"],
)
def test_the_memory_of_a_step_is_predicted(
    overrides: tuple[str, ...], published_folder: Path, repo_root: Path, tmp_path: Path, pack: object
) -> None:
    """With T5, an AutoencoderKL and the published texts, as `unialign plan configs/sd3-medium.yaml` assumes them."""
    from rich.console import Console

    from unialignment.memory import measured_peak, size_of, tensors_of
    from unialignment.planning import training_memory
    from unialignment.training.config import load_config
    from unialignment.training.loop import Trainer

    config = load_config(
        repo_root / "configs" / "tiny.yaml",
        [
            *(f"run.dir={tmp_path / 'run'}", "run.max_steps=4", "data.workers=0", f"model.initial={published_folder}"),
            *("text.max_length=256", "loss.cross=0", "loss.intrinsic=0", "logging.tensorboard=false"),
            *("logging.samples=false", "model.transformer={}"),
            "mixture={generate: 2, edit: 2, caption: 2, answer: 0, perceive: 0, control: 0, compose: 1, infill: 0}",
            *overrides,
        ],
    )
    trainer = Trainer(config, Console(quiet=True))
    source = trainer.source()
    count = config.micro_batches
    trainer.step([source(index) for index in range(count)])  # makes the optimizer's state
    micros = [source(index) for index in range(count, 2 * count)]
    step, _ = measured_peak(lambda: trainer.step(micros))
    state = [v for entry in trainer.optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    resident = size_of(tensors_of(trainer.objective)) + size_of(state) + size_of(trainer.ema.shadow.values())
    predicted = training_memory(config)
    assert predicted.weights + predicted.optimizer + predicted.average == pytest.approx(resident, rel=0.01)
    assert predicted.gradients + predicted.activations == pytest.approx(step, rel=0.15)
    assert predicted.peak == pytest.approx(resident + step, rel=0.15)
