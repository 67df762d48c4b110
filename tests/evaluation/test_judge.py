"""The judge: the truth scores full marks, and every single mistake costs the mark that it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation.judge import Judge, backgrounds_named
from unialignment.evaluation.results import METRICS
from unialignment.evaluation.world import TASKS
from unialignment.world.captions import Description
from unialignment.world.questions import Question
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.stream import WorldStream

DOG = SceneObject("dog", "noto", 24, 0, 0)
CAR = SceneObject("car", "fluent", 24, 40, 40)
SCENE = Scene("blue", (DOG, CAR))


@pytest.fixture(scope="module")
def judge(pack, nano) -> Judge:
    if set(nano.styles) != {"noto", "fluent"}:
        pytest.skip("the scenes here need the artwork of `unialign world build --source npm`")
    return Judge(pack, nano)


def drawn(judge: Judge, scene: Scene) -> np.ndarray:
    return judge.renderer.render(scene)


def prompt_sample(**stated: tuple) -> Sample:
    return Sample("generate", "...", meta={"scene": SCENE, "description": Description("...", "short", **stated)})


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_scores_full_marks(judge: Judge, pack, nano, task: str) -> None:
    stream = WorldStream(pack, nano, "held_out", 7)
    for index in range(6):
        sample = stream.sample(task, index)
        scores = judge.score(sample, sample.target_text if sample.target_image is None else sample.target_image)
        assert scores
        assert set(scores) <= set(METRICS)
        for key, value in scores.items():
            full = {"dB": 60.0, "number": 0.0}.get(METRICS[key].unit, 1.0)
            assert np.isnan(value) or value == full, (sample.prompt, key)


def test_generate_needs_every_object(judge: Judge) -> None:
    sample = prompt_sample()
    full = {"generate.objects": 1, "generate.scenes": 1, "generate.background": 1}
    assert judge.score(sample, drawn(judge, SCENE)) == full
    half = judge.score(sample, drawn(judge, SCENE.without_object(0)))
    assert (half["generate.objects"], half["generate.objects"].weight, half["generate.scenes"]) == (0.5, 2, 0)
    red = dataclasses.replace(SCENE, background="red")
    assert judge.score(sample, drawn(judge, red)) == full | {"generate.background": 0}


def test_generate_holds_to_what_is_stated_and_to_no_more(judge: Judge) -> None:
    swapped = Scene("blue", (dataclasses.replace(DOG, x=40, y=40), dataclasses.replace(CAR, x=0, y=0)))
    silent = judge.score(prompt_sample(), drawn(judge, swapped))
    assert set(silent) == {"generate.objects", "generate.scenes", "generate.background"}
    beside = Scene("blue", (DOG, dataclasses.replace(CAR, y=0)))
    sample = Sample(
        "generate",
        meta={"scene": beside, "description": Description("...", "short", places=(0,), relations=((0, "left", 1),))},
    )
    right = judge.score(sample, drawn(judge, beside))
    assert (right["generate.relations"], right["generate.places"]) == (1, 1)
    mirrored = Scene("blue", (dataclasses.replace(DOG, x=40), dataclasses.replace(CAR, x=0, y=0)))
    wrong = judge.score(sample, drawn(judge, mirrored))
    assert (wrong["generate.objects"], wrong["generate.relations"], wrong["generate.places"]) == (1, 0, 0)


@pytest.mark.parametrize(
    "mistake",
    [
        SCENE,  # nothing done
        Scene("red", (DOG,)),  # background changed as well
        Scene("blue", (dataclasses.replace(DOG, style="fluent"),)),
        Scene("blue", (dataclasses.replace(DOG, size=32),)),
        Scene("blue", (dataclasses.replace(DOG, x=16),)),
    ],
)
def test_an_edit_is_right_only_if_everything_is(judge: Judge, mistake: Scene) -> None:
    result = Scene("blue", (DOG,))
    sample = Sample("edit", target_image=drawn(judge, result), meta={"scene": result, "source": SCENE})
    assert judge.score(sample, drawn(judge, result)) == {"edit.success": 1, "edit.psnr_outside": 60}
    assert judge.score(sample, drawn(judge, mistake))["edit.success"] == 0


def test_psnr_outside_ignores_the_place_of_the_edit(judge: Judge) -> None:
    result = Scene("blue", (DOG,))
    sample = Sample("edit", target_image=drawn(judge, result), meta={"scene": result, "source": SCENE})
    failed = drawn(judge, SCENE)  # the car is still there, all else untouched
    assert judge.score(sample, failed)["edit.psnr_outside"] == 60


def test_captions(judge: Judge) -> None:
    sample = Sample("caption", meta={"scene": SCENE})
    full = {"caption.objects": 1, "caption.exact": 1, "caption.background": 1}
    assert judge.score(sample, "A flat car and two shaded dogs, on a blue background") == full
    assert judge.score(sample, "a car on a blue background") == {**full, "caption.objects": 0, "caption.exact": 0}
    assert judge.score(sample, "a car, a dog and a cat on a blue background") == {**full, "caption.exact": 0}
    assert judge.score(sample, "a car and a dog on a blue or red background") == {**full, "caption.background": 0}


def test_colours_inside_class_names_are_no_backgrounds(nano) -> None:
    assert backgrounds_named("a red apple on a pink background", dataclasses.replace(nano, names=("red apple",))) == {
        "pink"
    }


def test_answers_and_gaps(judge: Judge) -> None:
    question = Question("count", "how many dogs are there?", "two", ("two",))
    sample = Sample("answer", question.question, kind="count", meta={"question": question})
    assert judge.score(sample, "Two.") == {"vqa.accuracy": 1}
    assert judge.score(sample, "three") == {"vqa.accuracy": 0}
    gaps = Sample("infill", meta={"words": ("a", "flat", "car,", "on", "blue"), "gaps": (2, 4)})
    assert judge.score(gaps, "a flat car, on blue") == {"infill.accuracy": 1}
    assert judge.score(gaps, "a flat car, on red") == {"infill.accuracy": 0.5}
    assert judge.score(gaps, "a car") == {"infill.accuracy": 0}


def test_the_wrong_kind_of_output_is_refused(judge: Judge) -> None:
    with pytest.raises(InputError, match="no judge"):
        judge.score(Sample("caption", meta={"scene": SCENE}), drawn(judge, SCENE))
