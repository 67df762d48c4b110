"""Few-step students: the targets are the teacher's, errors shrink, texts stay, runs resume, the result loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unialignment
from unialignment.cli import main
from unialignment.errors import ConfigError, StorageError, UniAlignmentError
from unialignment.model.tokenizer import encode_conditions
from unialignment.training.batching import Batch
from unialignment.training.distill import Distiller, DistillSettings, Stage
from unialignment.training.distill_config import load_distill

PROMPTS = ["a dog", "the red apple", "a cat on the background", ""]


def batches_for(pipe: Any, seed: int = 0) -> Callable[[int], list[Batch]]:
    """Random pictures with prompts, edits of them, and captions."""
    ids, mask = encode_conditions(pipe.tokenizer, PROMPTS)
    words = pipe.tokenizer.encode(["a dog and a cat", "the apple", "a red dog", "blue"], length=6)[0]

    def make(update: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 * seed + update)
        pictures = torch.rand(2, 4, 3, 32, 32, generator=generator) * 2 - 1
        shared = {
            "kinds": ("",) * 4,
            "prompt_ids": ids,
            "prompt_mask": mask,
            "maskable": None,
            "pair_ids": torch.full((4,), -1),
            "weights": torch.ones(4),
        }
        image = {"target": "image", "target_images": pictures[0], "target_ids": None}
        text = {"target": "text", "target_images": None, "target_ids": words}
        return [
            Batch(tasks=("generate",) * 4, sources=(), **image, **shared),
            Batch(tasks=("edit",) * 4, sources=(pictures[1],), **image, **shared),
            Batch(tasks=("caption",) * 4, sources=(pictures[1],), **text, **shared),
        ]

    return make


def settings(*stages: Stage, **changes: Any) -> DistillSettings:
    options = {"guidance": {"generate": 30.0, "edit": 20.0}, "lr": 1e-3, "warmup": 2, "log_every": 5, "ema": 0.8}
    return DistillSettings(stages=stages, **{**options, **changes})


@pytest.fixture
def pipe(make_tiny_pipeline: Any) -> Any:
    return make_tiny_pipeline(seed=3)


def image_error(distiller: Distiller, stage: Stage, batches: list[Batch]) -> float:
    with torch.no_grad():
        losses = [
            distiller.image_loss(batch, stage, torch.Generator().manual_seed(5))
            for batch in batches
            if batch.target == "image"
        ]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("mode", ["prefix", "joint"])
def test_the_student_learns_guidance_and_then_half_the_steps(
    make_tiny_pipeline: Any, mode: str, tmp_path: Path
) -> None:
    pipe = make_tiny_pipeline(seed=3, attention_mode=mode)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    # A random model hardly heeds its prompt: strong guidance makes the two passes differ.
    stages = Stage(None, 40), Stage(2, 5)
    source = batches_for(pipe)
    distiller = Distiller(pipe, source, settings(*stages), tmp_path)
    held_out = batches_for(pipe, seed=1)(0)
    start = image_error(distiller, stages[0], held_out)
    distiller.run()
    # `teacher` is the last stage's student by now: measure the first stage's target again, by the original.
    distiller.teacher = distiller.original
    assert image_error(distiller, stages[0], held_out) < 0.6 * start
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher changed: {name}"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"guidance", "4 to 2 steps"}
    assert all(set(row) == {"stage", "update", "image", "text"} for row in rows)


def test_a_students_step_is_two_of_the_teachers(pipe: Any, tmp_path: Path) -> None:
    """With the student equal to the teacher, the loss is exactly that of one Euler step against two."""
    distiller = Distiller(pipe, batches_for(pipe), settings(Stage(None, 1), Stage(2, 1)), tmp_path)
    batch = batches_for(pipe)(0)[0]
    loss = float(distiller.image_loss(batch, Stage(2, 1), torch.Generator().manual_seed(7)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        target = pipe.autoencoder.encode(batch.target_images)
        noise = torch.randn(target.shape, generator=generator)
        steps = torch.randint(2, (4,), generator=generator)
        embedded = pipe.text_embedder.embed(batch.prompt_ids, batch.prompt_mask)

        def velocity(row: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
            one = slice(row, row + 1)
            return pipe.transformer(
                text_embeds=embedded[one],
                text_mask=batch.prompt_mask[one],
                latents=x,
                timestep=torch.tensor([1e3 * sigma]),
            ).velocity

        errors = []
        for row, step in enumerate(steps.tolist()):
            here, middle, there = (1 - step / 2 - part for part in (0.0, 0.25, 0.5))
            x = torch.lerp(target[row : row + 1], noise[row : row + 1], here)
            halfway = x + (middle - here) * velocity(row, x, here)
            arrived = halfway + (there - middle) * velocity(row, halfway, middle)
            straight = x + (there - here) * velocity(row, x, here)
            errors.append(((straight - arrived) / (there - here)).square().mean())
    assert loss == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)


def test_texts_cost_nothing_until_the_student_changes(pipe: Any, tmp_path: Path) -> None:
    distiller = Distiller(pipe, batches_for(pipe), settings(Stage(None, 1)), tmp_path)
    batch = batches_for(pipe)(0)[2]
    same = distiller.text_loss(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        distiller.student.text_proj_out.weight.mul_(1.5)
    changed = distiller.text_loss(batch, torch.Generator().manual_seed(0))
    assert abs(float(same)) < 1e-5
    assert float(changed) > 1e-3


def test_an_interrupted_run_ends_like_an_uninterrupted_one(pipe: Any, tmp_path: Path) -> None:
    stages = Stage(None, 6), Stage(2, 4)
    options = settings(*stages, checkpoint_every=2)
    whole = Distiller(pipe, batches_for(pipe), options, tmp_path / "whole")
    whole.run()

    class Killed(Exception):
        pass

    def failing(update: int) -> list[Batch]:
        if update == 8 and not resumed:
            raise Killed
        return batches_for(pipe)(update)

    resumed = False
    with pytest.raises(Killed):
        Distiller(pipe, failing, options, tmp_path / "cut").run()
    resumed = True
    again = Distiller(pipe, failing, options, tmp_path / "cut")
    again.run()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name
    with pytest.raises(ConfigError, match="other stages"):
        Distiller(pipe, failing, settings(Stage(None, 7)), tmp_path / "cut").run()


def test_the_result_is_a_model_that_draws_in_few_unguided_steps(pipe: Any, tmp_path: Path) -> None:
    folder = Distiller(pipe, batches_for(pipe), settings(Stage(None, 1), Stage(4, 1)), tmp_path).run()
    student = unialignment.load(folder)
    assert student.name == "tiny-4-step"
    steps: list[int] = []
    picture = student.generate("a dog", seed=0, callback_on_step_end=lambda _p, step, _t, _x: steps.append(step))
    assert steps == [0, 1, 2, 3]
    assert picture.settings["guidance_scale"] == 1.0
    assert student.caption(picture.images[0], num_inference_steps=1).texts


def test_a_loss_that_is_not_finite_stops_the_run(pipe: Any, tmp_path: Path) -> None:
    distiller = Distiller(pipe, batches_for(pipe), settings(Stage(None, 1)), tmp_path)
    with torch.no_grad():
        distiller.student.image_proj_out.weight.fill_(float("nan"))
    with pytest.raises(UniAlignmentError, match="isn't finite"):
        distiller.run()


def test_a_folder_that_cannot_be_made_is_explained(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Distiller(pipe, batches_for(pipe), settings(Stage(None, 1)), tmp_path / "file" / "run").run()


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (Stage(None, 0),),
        (Stage(4, 1),),
        (Stage(None, 1), Stage(8, 1), Stage(3, 1)),
        (Stage(None, 1), Stage(None, 1)),
    ],
)
def test_bad_stages(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(ConfigError, match="stages"):
        settings(*stages)


def test_the_configuration_of_the_bundled_model_is_usable(repo_root: Path) -> None:
    config = load_distill(repo_root / "configs" / "distill-nano.yaml", ["steps=[8,4]", "guidance.generate=4"])
    assert [stage.steps for stage in config.settings().stages] == [None, 8, 4]
    assert config.settings().guidance == {"generate": 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=[4]", "steps"),
        ("steps=[8,3]", "half"),
        ("steps=[0]", "steps.0"),
        ("mixture={generate: -1, edit: 2}", "mixture.generate"),
        ("mixture={paint: 3}", "paint"),
        ("mixture={generate: 0, edit: 0, perceive: 0, control: 0, compose: 0}", "draws"),
    ],
)
def test_bad_configurations_are_explained(
    repo_root: Path, tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repo_root / "configs" / "distill-nano.yaml")
    assert main(["distill", config, f"dir={tmp_path}", "model=/nowhere", override, "--quiet"]) == 2
    assert message in capsys.readouterr().err
