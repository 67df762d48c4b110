"""Few-step students: targets are the teacher's own way, errors shrink, texts stay, runs resume, students load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import unialignment
from unialignment.cli import main
from unialignment.errors import CheckpointError, ConfigError, StorageError, UniAlignmentError
from unialignment.model.tokenizer import encode_conditions
from unialignment.training.batching import Batch
from unialignment.training.distill import Distiller, DistillSettings, Stage
from unialignment.training.distill_config import load_distill, world_source
from unialignment.training.distill_trajectories import Teacher, TrajectoryStore

PROMPTS = ["a dog", "the red apple", "a cat on the background", ""]
STRONG = {"generate": 30.0, "edit": 20.0}
"""A random model hardly heeds its prompt: strong guidance makes the two passes differ."""


def batches_for(pipe: Any, seed: int = 0) -> Callable[[int, str], list[Batch]]:
    """Random pictures with prompts, edits of them, and captions."""
    ids, mask = encode_conditions(pipe.tokenizer, PROMPTS)
    words = pipe.tokenizer.encode(["a dog and a cat", "the apple", "a red dog", "blue"], length=6)[0]

    def make(call: int, target: str) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 * seed + call)
        pictures = torch.rand(2, 4, 3, 32, 32, generator=generator) * 2 - 1
        shared = {
            "kinds": ("",) * 4,
            "prompt_ids": ids,
            "prompt_mask": mask,
            "maskable": None,
            "pair_ids": torch.full((4,), -1),
            "weights": torch.ones(4),
        }
        if target == "text":
            text = {"target": "text", "target_images": None, "target_ids": words}
            return [Batch(tasks=("caption",) * 4, sources=(pictures[1],), **text, **shared)]
        image = {"target": "image", "target_images": pictures[0], "target_ids": None}
        return [
            Batch(tasks=("generate",) * 4, sources=(), **image, **shared),
            Batch(tasks=("edit",) * 4, sources=(pictures[1],), **image, **shared),
        ]

    return make


def settings(*stages: Stage, **changes: Any) -> DistillSettings:
    options = {"guidance": STRONG, "lr": 2e-3, "warmup": 2, "log_every": 5, "ema": 0.8, "trajectories": 3}
    return DistillSettings(stages=stages, **{**options, **changes})


@pytest.fixture
def pipe(make_tiny_pipeline: Any) -> Any:
    pipe = make_tiny_pipeline(seed=3)
    for task in ("generate", "edit"):
        pipe.sampling[task] = {"num_inference_steps": 4}
    return pipe


def test_trajectories_are_the_pipelines_own(pipe: Any) -> None:
    """From the same noise the pipeline's sampler, with guidance, arrives where the trajectory does."""
    batch = batches_for(pipe)(0, "image")[1]
    found = Teacher(pipe, 2, STRONG, None).draw(batch, torch.Generator().manual_seed(5))
    assert found.points.shape[:2] == (3, 4)
    assert found.grid.tolist() == [1.0, 0.5, 0.0]
    reached: list[torch.Tensor] = []

    def start_there(_pipe: Any, step: int, _time: float, given: dict[str, Any]) -> None:
        reached.append(given["latents"])

    noise = found.points[0]
    import unialignment.sampling as sampling

    drawn = sampling.SeededNoise
    sampling.SeededNoise = lambda seeds, shape: lambda: noise[2:3]
    try:
        source = (batch.sources[0][2].permute(1, 2, 0) + 1) * 127.5
        pipe.edit(
            PROMPTS[2],
            source.round().byte().numpy(),
            guidance_scale=20.0,
            num_inference_steps=4,
            callback_on_step_end=start_there,
        )
    finally:
        sampling.SeededNoise = drawn
    # The picture was rounded to eight bits on its way in; guidance of 20 magnifies that.
    torch.testing.assert_close(reached[1], found.points[1, 2:3], atol=0.05, rtol=0.05)
    torch.testing.assert_close(reached[3], found.points[2, 2:3], atol=0.05, rtol=0.05)
    assert float((found.points[2] - found.points[0]).abs().mean()) > 0.3


@pytest.mark.parametrize("mode", ["prefix", "joint"])
def test_the_student_learns_where_guided_steps_arrive(make_tiny_pipeline: Any, mode: str, tmp_path: Path) -> None:
    pipe = make_tiny_pipeline(seed=3, attention_mode=mode)
    for task in ("generate", "edit"):
        pipe.sampling[task] = {"num_inference_steps": 4}
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    stages = Stage(4, 30), Stage(2, 10)
    distiller = Distiller(pipe, batches_for(pipe), settings(*stages), tmp_path)
    distiller.run()
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher changed: {name}"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"4 steps", "2 steps"}
    held_out = [row["held_out"] for row in rows if "held_out" in row]
    fresh = Distiller(pipe, batches_for(pipe), settings(*stages), tmp_path / "fresh")
    fresh.trajectories = distiller.trajectories
    # Held-out trajectories: better than the teacher without guidance, in both stages.
    assert held_out[0] < 0.8 * fresh.held_out(stages[0])
    assert held_out[1] < 0.8 * fresh.held_out(stages[1])


def test_windows_are_slopes_between_the_points(pipe: Any, tmp_path: Path) -> None:
    """With the student equal to the teacher, the loss is that of one unguided step against the points."""
    stages = Stage(4, 1), Stage(2, 1)
    distiller = Distiller(pipe, batches_for(pipe), settings(*stages), tmp_path)
    batch = batches_for(pipe)(0, "image")[0]
    part = distiller.teacher.draw(batch, torch.Generator().manual_seed(1))
    embedded = pipe.text_embedder.embed(batch.prompt_ids, batch.prompt_mask)
    errors = []
    with torch.no_grad():
        for window in range(2):
            x, there = part.points[2 * window], part.points[2 * window + 2]
            velocity = pipe.transformer(
                text_embeds=embedded,
                text_mask=batch.prompt_mask,
                latents=x,
                timestep=torch.full((4,), 1000.0 * (1 - window / 2)),
            ).velocity
            errors.append(((x - 0.5 * velocity - there) * 2).square().mean())
        loss = float(distiller.window_loss(part, stages[1], 2))
        one = float(distiller.window_loss(part, stages[1], 1, torch.Generator().manual_seed(0)))
    assert loss == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)
    assert 0 < one != pytest.approx(loss, rel=1e-3)


@torch.no_grad()
def test_with_a_shift_velocities_weigh_evenly_or_by_their_steps(pipe: Any, tmp_path: Path) -> None:
    """The same trajectories under both weightings; at σ = 1 a shift of 3 makes steps short."""
    stage = Stage(4, 1)
    chosen = {"shift": 3.0, "trajectories": 2}
    even = Distiller(pipe, batches_for(pipe), settings(stage, weighting="velocity", **chosen), tmp_path / "even")
    arrival = Distiller(pipe, batches_for(pipe), settings(stage, **chosen), tmp_path / "arrival")
    part = even.teacher.draw(batches_for(pipe)(0, "image")[0], torch.Generator().manual_seed(1))
    change = part.grid.diff()
    errors = []
    for window, (here, step) in enumerate(zip(part.grid, change, strict=False)):
        batch = replace(part, points=part.points[window : window + 2], grid=part.grid[window : window + 2])
        errors.append(float(even.window_loss(batch, Stage(1, 1), 1)))
        assert 0 < float(here) <= 1
        assert float(step) < 0
    weights = (4 * change).square()
    assert float(even.window_loss(part, stage, 4)) == pytest.approx(sum(errors) / 4, rel=1e-4)
    expected = float((weights * torch.tensor(errors)).mean())
    assert float(arrival.window_loss(part, stage, 4)) == pytest.approx(expected, rel=1e-4)
    assert float(weights[0]) < 0.2 < 2.5 < float(weights[-1])


def test_texts_cost_nothing_until_the_student_changes(pipe: Any, tmp_path: Path) -> None:
    distiller = Distiller(pipe, batches_for(pipe), settings(Stage(2, 1)), tmp_path)
    batch = batches_for(pipe)(0, "text")[0]
    same = distiller.text_loss(batch, torch.Generator().manual_seed(0)).detach()
    with torch.no_grad():
        distiller.student.text_proj_out.weight.mul_(1.5)
    changed = distiller.text_loss(batch, torch.Generator().manual_seed(0)).detach()
    assert abs(float(same)) < 1e-5
    assert float(changed) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(pipe: Any, tmp_path: Path, optimizer: str) -> None:
    """Cut off once among the trajectories and once in the second stage."""
    stages = Stage(4, 4), Stage(2, 4)
    options = settings(*stages, checkpoint_every=2, optimizer=optimizer)
    whole = Distiller(pipe, batches_for(pipe), options, tmp_path / "whole")
    whole.run()

    class Killed(Exception):
        pass

    cuts = {("image", 1), ("text", 7)}

    def failing(call: int, target: str) -> list[Batch]:
        if (target, call) in cuts:
            cuts.discard((target, call))
            raise Killed
        return batches_for(pipe)(call, target)

    for _ in range(2):
        with pytest.raises(Killed):
            Distiller(pipe, failing, options, tmp_path / "cut").run()
    again = Distiller(pipe, failing, options, tmp_path / "cut")
    folders = again.run()
    assert [folder.name for folder in folders] == ["model-4", "model-2"]
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name
    with pytest.raises(ConfigError, match="other stages"):
        Distiller(pipe, failing, settings(Stage(4, 7)), tmp_path / "cut").run()


def test_the_time_allowed_ends_each_part(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on one second a look: the budget decides how many files and updates there are."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    options = settings(Stage(2, 1000), Stage(1, 500), trajectories=100, budget_seconds=15.0, draw_share=0.2)
    distiller = Distiller(pipe, batches_for(pipe), options, tmp_path)
    distiller.run()
    assert distiller.files == 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["update"]) for row in rows if "held_out" in row] == [("2 steps", 8), ("1 steps", 4)]


def test_students_draw_in_their_few_unguided_steps(pipe: Any, tmp_path: Path) -> None:
    folders = Distiller(pipe, batches_for(pipe), settings(Stage(4, 1), Stage(2, 1)), tmp_path).run()
    for folder, count in zip(folders, (4, 2), strict=True):
        student = unialignment.load(folder)
        assert student.name == f"tiny-{count}-step"
        steps: list[int] = []
        picture = student.generate("a dog", seed=0, callback_on_step_end=lambda _p, step, _t, _x: steps.append(step))  # noqa: B023
        assert steps == list(range(count))
        assert picture.settings["guidance_scale"] == 1.0
        assert student.caption(picture.images[0], num_inference_steps=1).texts


def test_trajectories_of_another_teacher_are_refused(pipe: Any, make_tiny_pipeline: Any, tmp_path: Path) -> None:
    Distiller(pipe, batches_for(pipe), settings(Stage(2, 1)), tmp_path).run()
    other = make_tiny_pipeline(seed=4)
    with pytest.raises(ConfigError, match="another teacher"):
        Distiller(other, batches_for(other), settings(Stage(2, 1)), tmp_path).run()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "000000.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="000000"):
        TrajectoryStore(tmp_path, {})


def test_a_loss_that_is_not_finite_stops_the_run(pipe: Any, tmp_path: Path) -> None:
    distiller = Distiller(pipe, batches_for(pipe), settings(Stage(2, 1)), tmp_path)
    with torch.no_grad():
        distiller.student.image_proj_out.weight.fill_(float("nan"))
    with pytest.raises(UniAlignmentError, match="isn't finite"):
        distiller.run()


def test_a_folder_that_cannot_be_made_is_explained(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Distiller(pipe, batches_for(pipe), settings(Stage(2, 1)), tmp_path / "file" / "run").run()


def test_a_teacher_that_guides_on_pictures_is_refused(pipe: Any, tmp_path: Path) -> None:
    pipe.sampling["edit"] = {"image_guidance_scale": 1.5}
    with pytest.raises(ConfigError, match="image_guidance_scale"):
        Distiller(pipe, batches_for(pipe), settings(Stage(2, 1)), tmp_path)


def test_each_task_keeps_its_own_noise_levels(pipe: Any, tmp_path: Path) -> None:
    pipe.sampling["generate"]["shift"] = 4.0
    source, noise = batches_for(pipe), torch.Generator().manual_seed(0)
    teacher, pictures = Teacher(pipe, 2, STRONG, None), source(0, "image")
    grids = [teacher.draw(batch, noise).grid for batch in pictures]
    torch.testing.assert_close(grids[0], torch.tensor([1.0, 0.8, 0.0]))  # 4 · 0.5 / (1 + 3 · 0.5)
    torch.testing.assert_close(grids[1], torch.tensor([1.0, 0.5, 0.0]))
    (folder,) = Distiller(pipe, source, settings(Stage(2, 1)), tmp_path).run()
    student = unialignment.load(folder)
    assert (student.sampling["generate"]["shift"], student.sampling["edit"]["shift"]) == (4.0, 1.0)
    mixed = replace(pictures[0], tasks=("generate", "edit", "edit", "edit"))
    with pytest.raises(ConfigError, match="shift=…"):
        teacher.draw(mixed, noise)
    assert Teacher(pipe, 2, STRONG, 2.0).draw(mixed, noise).grid[1] == pytest.approx(2 / 3)


def test_a_student_carries_the_sampler_that_it_is_given(pipe: Any, tmp_path: Path) -> None:
    chosen = {"solver": "dpmpp", "num_inference_steps": 3}
    both = {**chosen, "edit": {"num_inference_steps": 2}, "rewrite": {"num_inference_steps": 5}}
    (folder,) = Distiller(pipe, batches_for(pipe), settings(Stage(4, 1), sampler=both), tmp_path).run()
    student = unialignment.load(folder)
    assert (student.sampling["edit"]["solver"], student.sampling["edit"]["num_inference_steps"]) == ("dpmpp", 2)
    assert {**student.sampling["generate"], **chosen} == student.sampling["generate"]
    assert student.sampling["generate"]["guidance_scale"] == 1.0
    assert student.generate("a dog", seed=0).settings["solver"] == "dpmpp"
    assert student.sampling["rewrite"] == {"num_inference_steps": 5}  # what it writes has nothing of the others'
    assert student.rewrite("a dog", seed=0).settings["num_inference_steps"] == 5


def test_a_student_goes_on_from_an_earlier_one(pipe: Any, tmp_path: Path) -> None:
    stage = settings(Stage(2, 20))
    (folder,) = Distiller(pipe, batches_for(pipe), stage, tmp_path / "one").run()
    earlier = unialignment.load(folder).transformer
    fresh, later = (Distiller(pipe, batches_for(pipe), stage, tmp_path / "one", initial=it) for it in (None, earlier))
    for distiller in (fresh, later):
        distiller.trajectories = TrajectoryStore(
            tmp_path / "one" / "trajectories", {**distiller.teacher.describe(), "seed": 0}
        )
    assert later.held_out(Stage(2, 20)) < 0.9 * fresh.held_out(Stage(2, 20))
    for name, weight in later.original.state_dict().items():  # the teacher stays what it was
        assert torch.equal(weight, fresh.original.state_dict()[name])
    with pytest.raises(ConfigError, match=r"initial.*other tensors"):
        Distiller(pipe, batches_for(pipe), stage, tmp_path / "two", initial=torch.nn.Linear(2, 2))


def test_the_bundled_model_can_be_its_teacher(repo_root: Path, pack: Any) -> None:
    config, nano = load_distill(repo_root / "configs" / "distill-nano.yaml"), unialignment.load("nano")
    teacher = Teacher(nano, 2, config.guidance, config.shift)
    batches = world_source(config, nano.tokenizer, nano.text_limit)(0, "image")
    drawn = [teacher.draw(batch, torch.Generator().manual_seed(0)) for batch in batches]
    assert {task for part in drawn for task in part.tasks} == {"generate", "edit", "perceive", "control", "compose"}


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ((), {}, "stages"),
        ((Stage(2, 0),), {}, "stages"),
        ((Stage(8, 1), Stage(3, 1)), {}, "stages"),
        ((Stage(4, 1), Stage(4, 1)), {}, "stages"),
        ((Stage(4, 1),), {"trajectories": 1}, "trajectories"),
        ((Stage(4, 1),), {"draw_share": 1.0}, "draw_share"),
    ],
)
def test_bad_settings(stages: tuple[Stage, ...], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*stages, **changes)


def test_the_configuration_of_the_bundled_model_is_usable(repo_root: Path, pipe: Any) -> None:
    config = load_distill(repo_root / "configs" / "distill-nano.yaml", ["guidance.generate=4", "mixture.answer=0"])
    found = config.settings()
    assert [stage.steps for stage in found.stages] == [20]
    assert found.guidance == {"generate": 4}
    assert found.budget_seconds == 1800
    source = world_source(config, pipe.tokenizer, 200)
    assert {task for batch in source(0, "text") for task in batch.tasks} == {"caption", "infill", "rewrite"}
    assert source(3, "text")[0].target_ids.tolist() == source(3, "text")[0].target_ids.tolist()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=[4]", "steps"),
        ("steps=[8,3]\nupdates=[1,1]", "dividing"),
        ("steps=[8,4]", "stages"),
        ("steps=[0]", "steps.0"),
        ("mixture={generate: -1, edit: 2}", "mixture.generate"),
        ("mixture={paint: 3}", "paint"),
        ("sampler={solvr: heun}", "did you mean 'solver'"),
        ("sampler={edit: {solvr: heun}}", "did you mean 'solver'"),
        ("sampler={edit: 8}", "under edit"),
        ("sampler={caption: {solver: heun}}", "caption has no option 'solver'"),
        ("mixture={generate: 0, edit: 0, perceive: 0, control: 0, compose: 0}", "draws"),
    ],
)
def test_bad_configurations_are_explained(
    repo_root: Path, tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repo_root / "configs" / "distill-nano.yaml")
    assert main(["distill", config, f"dir={tmp_path}", "model=/nowhere", *override.splitlines(), "--quiet"]) == 2
    assert message in capsys.readouterr().err
