"""The training loop: it learns, resumes bit for bit, stops cleanly, averages gradients, survives bad losses."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import unialignment
from unialignment.data.sample import Sample
from unialignment.errors import ConfigError, InputError, StorageError, UniAlignmentError
from unialignment.model.tokenizer import TextTokenizer
from unialignment.training import checkpoint
from unialignment.training.batching import collate
from unialignment.training.config import TransformerConfig, load_config
from unialignment.training.logging import read_metrics
from unialignment.training.loop import Trainer
from unialignment.training.objective import Objective
from unialignment.training.sharing import count_tokens, take_share

Make = Callable[..., TransformerConfig]
FEW = "mixture={generate: 2, edit: 1, perceive: 0, control: 0, compose: 0, caption: 2, answer: 1, infill: 0}"


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss/total"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss/total" in r}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    ema = {f"ema.{k}": v for k, v in trainer.ema.shadow.items()}
    return {k: v.detach().clone() for k, v in trainer.trainable.state_dict().items()} | ema


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_after_a_crash_is_bit_exact(tiny: Make, tmp_path: Path, silent, monkeypatch, optimizer: str) -> None:
    options = [FEW, "micro_batches=2", f"optimizer.name={optimizer}", "run.checkpoint_minutes=60"]
    whole = Trainer(tiny(*options, f"run.dir={tmp_path / 'whole'}"), silent)
    whole.train()

    config = tiny(*options, "run.checkpoint_minutes=1e-9")
    first = Trainer(config, silent)
    real, calls = Objective.forward, []

    def crash(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:  # in the second micro-batch of the fourth step; operations were counted on the first
            raise RuntimeError("power cut")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "forward", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        first.train()
    monkeypatch.undo()
    torch.manual_seed(12345)  # whatever the new process does before resuming must not matter
    second = Trainer(config, silent)
    second.train()

    assert second.resumed_at == 3
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "run")) == 6
    expected = weights(whole)
    for name, value in weights(second).items():
        assert torch.equal(value, expected[name]), name


def test_validation_and_samples_do_not_change_the_run(tiny: Make, tmp_path: Path, silent) -> None:
    plain = Trainer(tiny(FEW, f"run.dir={tmp_path / 'plain'}", "run.max_steps=3"), silent)
    plain.train()
    watched = Trainer(tiny(FEW, "run.max_steps=3", "logging.validation_steps=1", "logging.samples=true"), silent)
    watched.train()
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(watched).values(), strict=True))
    assert len(watched.validations) == 4 and watched.objective.transformer.training


def test_it_learns_and_leaves_a_self_describing_folder(tiny: Make, tmp_path: Path, silent) -> None:
    config = tiny("run.max_steps=25", "logging.samples=true", "logging.tensorboard=true", "optimizer.lr=4e-3")
    result = Trainer(config, silent).train()
    folder = tmp_path / "run"
    curve = losses(folder)
    assert sum(list(curve.values())[-5:]) < 0.85 * sum(list(curve.values())[:5])
    assert load_config(folder / "config.yaml") == config
    assert list((folder / "tensorboard").iterdir())
    for task in ("generate", "edit", "perceive", "control", "compose"):
        assert (folder / "samples" / f"{task}-0000025.png").is_file()
        assert (folder / "samples" / f"{task}.md").is_file()
    assert "truth:" in (folder / "samples" / "caption.md").read_text()
    record = [r for r in read_metrics(folder / "metrics.jsonl") if "validation/task/generate" in r][-1]
    for time in ("0.95", "0.99"):
        right, empty = (record[f"validation/gap/edit/{time}/{kind}"] for kind in ("right", "empty"))
        assert record[f"validation/gap/edit/{time}/gap"] == pytest.approx(empty - right, abs=1e-5)
    summary = (folder / "summary.md").read_text()
    assert "25 steps of 16 samples" in summary and "Prompt-following" in summary and "None." in summary
    pipeline = unialignment.load(result, device="cpu")
    picture = pipeline.generate("a dog", seed=1, num_inference_steps=1).images[0]
    assert picture.size == (64, 64)


def test_the_saved_model_is_the_average(tiny: Make, silent) -> None:
    trainer = Trainer(tiny(FEW, "run.max_steps=3", "ema.decay=0.9"), silent)
    result = trainer.train()
    saved = unialignment.load(result, device="cpu").transformer.state_dict()
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(saved[name], trainer.ema.shadow[f"transformer.{name}"])
    assert not torch.equal(saved[name], trainer.objective.transformer.state_dict()[name])


def test_the_best_validation_is_kept_with_its_weights(tiny: Make, tmp_path: Path, silent, monkeypatch) -> None:
    config = tiny(FEW, "run.max_steps=5", "logging.validation_steps=1", "run.keep_best=1", "run.keep_checkpoints=1")
    trainer = Trainer(config, silent)
    real, scores = trainer.validate, iter([3.0, 1.0, 2.0, 4.0, 2.5, 2.5])

    def validated(log=None):
        found = real(log)
        trainer.validations[-1] = {"step": trainer.progress.step, "task/edit": next(scores)}
        return found

    averages = {}
    step = trainer.step

    def stepped(micros):
        logs = step(micros)
        averages[trainer.progress.step] = {k: v.clone() for k, v in trainer.ema.shadow.items()}
        return logs

    monkeypatch.setattr(trainer, "validate", validated)
    monkeypatch.setattr(trainer, "step", stepped)
    trainer.train()
    assert trainer.store.best() == [{"step": 2, "score": 1.0}]
    assert sorted(p.name for p in trainer.store.folder.glob("step-*")) == ["step-00000002", "step-00000005"]
    name = "transformer_blocks.0.attn.to_q.weight"
    for folder, which in (("model-best", 2), ("model", 5)):
        saved = unialignment.load(tmp_path / "run" / folder, device="cpu").transformer.state_dict()
        assert torch.equal(saved[name], averages[which][f"transformer.{name}"])
    assert not torch.equal(averages[2][f"transformer.{name}"], averages[5][f"transformer.{name}"])


def test_a_stage_starts_from_the_averages_that_another_left(tiny: Make, tmp_path: Path, silent) -> None:
    first = Trainer(tiny(FEW, "run.max_steps=2", "ema.decay=0.9"), silent)
    folder = first.train()
    second = Trainer(tiny(FEW, f"model.initial={folder}", "text.tokenizer=null", f"run.dir={tmp_path / 'two'}"), silent)
    now = dict(second.objective.transformer.named_parameters())
    for name, value in now.items():
        assert torch.equal(value, first.ema.shadow[f"transformer.{name}"]), name
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(now[name], dict(first.objective.transformer.named_parameters())[name])
    assert second.progress.step == 0 and second.ema.updates == 0 and not second.optimizer.state


def test_a_stage_may_read_longer_texts_than_the_one_before(tiny: Make, tmp_path: Path, silent) -> None:
    first = Trainer(tiny(FEW, "run.max_steps=1"), silent)
    length = first.objective.text_embedder.max_length
    folder = first.train()
    told = io.StringIO()
    longer = (f"model.initial={folder}", "text.tokenizer=null", f"run.dir={tmp_path / 'two'}")
    second = Trainer(tiny(FEW, "run.max_steps=1", *longer, f"text.max_length={length + 8}"), Console(file=told))
    assert f"{length} positions are extended" in " ".join(told.getvalue().split())
    assert unialignment.load(second.train(), device="cpu").text_limit == length + 8


def test_gradients_are_averaged_over_micro_batches(tiny: Make, silent, monkeypatch) -> None:
    trainer = Trainer(tiny(FEW, "optimizer.clip=null", "optimizer.schedule=constant"), silent)
    data = trainer.source()
    micros = [data(0), data(1)]
    separate = []
    for micro in micros:
        trainer.noise.manual_seed(5)
        trainer.objective(micro[0], trainer.noise).loss.backward()
        separate.append([p.grad.clone() if p.grad is not None else None for p in trainer.parameters])
        trainer.optimizer.zero_grad(set_to_none=True)
    seen: list[torch.Tensor | None] = []

    def record() -> None:
        seen.extend(None if p.grad is None else p.grad.clone() for p in trainer.parameters)

    monkeypatch.setattr(trainer.optimizer, "step", record)
    real = trainer.objective.forward

    def reseeded(batches, generator):
        generator.manual_seed(5)
        return real(batches, generator)

    monkeypatch.setattr(trainer.objective, "forward", reseeded)
    trainer.step(micros)
    compared = 0
    for first, second, both in zip(*separate, seen, strict=True):
        if both is not None and first is not None and second is not None:
            assert torch.allclose(both, (first + second) / 2, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared > 20


def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(tiny: Make, tmp_path: Path, monkeypatch) -> None:
    with (tmp_path / "out.txt").open("w") as file:
        trainer = Trainer(tiny(FEW, "run.max_steps=1000"), Console(file=file))
        real = trainer.step

        def interrupted(micros):
            logs = real(micros)
            if trainer.progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return logs

        monkeypatch.setattr(trainer, "step", interrupted)
        assert trainer.train() == tmp_path / "run"
    assert trainer.store.load()[1]["progress"]["step"] == 2
    text = (tmp_path / "out.txt").read_text()
    assert "Stopped by SIGTERM" in text and "resume" in text
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(tiny: Make, silent, monkeypatch) -> None:
    trainer = Trainer(tiny(FEW, "run.max_skipped_steps=2"), silent)
    data = trainer.source()
    trainer.step([data(0)])
    before = weights(trainer)
    real = trainer.objective.forward

    def poisoned(batches, generator):
        output = real(batches, generator)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(trainer.objective, "forward", poisoned)
    trainer.step([data(1)])
    trainer.step([data(2)])
    assert trainer.skipped == 2 and trainer.progress.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(trainer).values(), strict=True))
    with pytest.raises(UniAlignmentError, match=r"not finite.*optimizer\.lr"):
        trainer.step([data(3)])
    monkeypatch.undo()
    trainer.step([data(4)])
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), weights(trainer).values(), strict=True))


@pytest.mark.slow
def test_data_workers_that_are_killed_change_nothing_in_a_run(tiny: Make, tmp_path: Path, silent, monkeypatch) -> None:
    Trainer(tiny(FEW, f"run.dir={tmp_path / 'whole'}"), silent).train()
    with (tmp_path / "out.txt").open("w") as file:
        trainer = Trainer(tiny(FEW, "data.workers=2"), Console(file=file))
        real = trainer.step

        def stepped(micros):
            if trainer.progress.step == 2:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)
            return real(micros)

        monkeypatch.setattr(trainer, "step", stepped)
        trainer.train()
    assert (tmp_path / "out.txt").read_text().count("another takes its place") == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 6


def test_a_full_disk_ends_the_run_with_one_clear_error(tiny: Make, silent, monkeypatch) -> None:
    config = tiny(FEW, "run.checkpoint_minutes=1e-9")
    trainer = Trainer(config, silent)
    real, saves = checkpoint.save_file, []

    def full(*args):
        saves.append(1)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="step 3"):
        trainer.train()
    monkeypatch.undo()
    assert Trainer(config, silent).store.load()[1]["step"] == 2
    again = Trainer(config, silent)
    again.train()
    assert again.resumed_at == 2 and again.progress.step == 6


def test_resuming_with_another_model_is_refused_and_fresh_starts_over(tiny: Make, tmp_path: Path, silent) -> None:
    Trainer(tiny(FEW, "run.max_steps=1"), silent).train()
    changed = ["run.max_steps=2", FEW, "model.transformer={num_layers: 1}"]
    with pytest.raises(ConfigError, match=r"'model'.*run\.fresh"):
        Trainer(tiny(*changed), silent).train()
    trainer = Trainer(tiny(*changed, "run.fresh=true"), silent)
    trainer.train()
    assert trainer.resumed_at is None and sorted(losses(tmp_path / "run")) == [1, 2]
    longer = Trainer(tiny("run.max_steps=3", FEW, "model.transformer={num_layers: 1}", "optimizer.lr=1e-5"), silent)
    longer.train()  # a longer run at another rate is a resumption
    assert longer.resumed_at == 2 and sorted(losses(tmp_path / "run")) == [1, 2, 3]


def test_the_data_position_is_one_integer(tiny: Make, silent) -> None:
    config = tiny(FEW, "micro_batches=3", "run.max_steps=2")
    trainer = Trainer(config, silent)
    trainer.train()
    assert json.loads((trainer.store.latest() / "state.json").read_text())["data_position"] == 6
    one, two = trainer.source(), trainer.source()
    two(0), two(3)
    first, second = one(5)[0], two(5)[0]
    assert all(torch.equal(a.prompt_ids, b.prompt_ids) for a, b in zip(first, second, strict=True))
    assert not torch.equal(one(4)[0][0].target_images, first[0].target_images)


def test_paired_tasks_meet_in_one_micro_batch(tiny: Make, silent) -> None:
    trainer = Trainer(tiny("mixture={generate: 3, caption: 2, compose: 4}", "prompt_dropout=0"), silent)
    batches, _ = trainer.source()(7)
    chosen = [b for b in batches if {"generate", "caption"} & set(b.tasks)]
    pairs = {b.target: {int(i) for i in b.pair_ids if i >= 0} for b in chosen}
    assert len(pairs["image"] & pairs["text"]) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.flavour=nanoo", "flavour"),
        ("model.transformer={num_layer: 3}", "did you mean 'num_layers'"),
        ("autoencoder.path=/nowhere", "unialign train configs/autoencoder.yaml"),
        ("run.device=gpu", "run.device"),
        ("model.transformer={attention_mode: joint}", "cross"),
        ("text.max_length=32", "at least 40"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(tiny: Make, silent, override: str, words: str) -> None:
    with pytest.raises(UniAlignmentError, match=words):
        Trainer(tiny(FEW, override), silent)


def test_bf16_trains(tiny: Make, silent) -> None:
    trainer = Trainer(tiny(FEW, "run.precision=bf16"), silent)
    data = trainer.source()
    first = float(trainer.step([data(0)])["loss/total"])
    assert first == first and all(p.dtype == torch.float32 for p in trainer.parameters)


class Letters:
    """A teacher that is quick: mean colour, and counts of a few letters."""

    image_dim, text_dim, fingerprint = 3, 4, "letters"
    pictures = 0

    def embed_images(self, images):
        Letters.pictures += len(images)
        return torch.stack([torch.from_numpy(image).float().mean((0, 1)) for image in images])

    def embed_texts(self, texts):
        return torch.tensor([[float(text.count(letter)) for letter in "aeio"] for text in texts])


def test_the_teacher_runs_once_and_its_losses_are_trained(tiny: Make, silent, monkeypatch) -> None:
    monkeypatch.setattr("unialignment.alignment.teachers.load_teacher", lambda name: Letters())
    Letters.pictures = 0
    options = ["mixture={generate: 2, caption: 2, edit: 0, perceive: 0, control: 0, compose: 0, answer: 0, infill: 0}"]
    options += ["teacher={name: letters, pool: 5}", "run.max_steps=4"]
    trainer = Trainer(tiny(*options), silent)
    trainer.train()
    assert Letters.pictures == 5
    record = [r for r in read_metrics(trainer.folder / "metrics.jsonl") if "train/loss/total" in r][-1]
    assert 0 < record["train/loss/intrinsic_image"] < 2 and 0 < record["train/loss/intrinsic_text"] < 2
    assert "projectors" in dict(trainer.trainable.named_children())
    Trainer(tiny(*options), silent)
    assert Letters.pictures == 5  # found in the cache


def test_texts_that_do_not_fit_are_replaced_and_counted(tiny: Make, silent) -> None:
    trainer = Trainer(tiny("mixture.generate=8", "text.max_length=48", "world={varied: 1, long: 0.5}"), silent)
    produce = trainer.source()
    batches, replaced = produce(0)
    assert replaced["generate"] > 0
    assert all(batch.prompt_ids.shape[1] <= 48 for batch in batches) and sum(map(len, batches)) == 8 + 7 * 2
    trainer.step([(batches, replaced)])
    assert trainer.replaced["generate"] == replaced["generate"]


def test_a_length_that_nothing_fits_is_an_error(tiny: Make, silent) -> None:
    trainer = Trainer(tiny("mixture={generate: 1}"), silent)
    short = replace(trainer.source, config=tiny("mixture={generate: 1}", "text.max_length=8"))
    with pytest.raises(InputError, match=r"in a row.*text\.max_length"):
        short()(0)


def test_latents_from_a_cache_are_counted_as_the_tokens_that_they_are(tokenizer_folder: Path) -> None:
    tokenizer = TextTokenizer.from_pretrained(tokenizer_folder)
    counts = []
    for shape, encoded in (((32, 48, 3), False), ((4, 8, 12), True)):  # of an autoencoder that takes 4 x 4 pixels
        picture = np.zeros(shape, np.float32 if encoded else np.uint8)
        samples = [Sample("edit", prompt="a", sources=(picture,), target_image=picture) for _ in range(3)]
        batches = collate(samples, tokenizer, encoded=encoded)
        shares = [take_share(batch, part, 2) for batch in batches for part in range(2)]
        counts.append(count_tokens(batches, pixels=8, latents=2))
        assert count_tokens(shares, pixels=8, latents=2) == counts[-1]
        assert counts[-1] == 3 * (2 * 4 * 6 + batches[0].prompt_ids.shape[1])
    assert counts[0] == counts[1]
