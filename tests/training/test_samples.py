"""Which scenes a run is trained on, and which it is measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from unialignment.errors import InputError
from unialignment.training.config import TransformerConfig
from unialignment.training.samples import StepProducer, StepSource, open_data
from unialignment.training.world_samples import open_stream
from unialignment.world.splits import is_held_out

Make = Callable[..., TransformerConfig]


def styles_of(stream: object, count: int = 200) -> Counter[str]:
    scenes = [stream.sample("caption", index, draw=False).meta["scene"] for index in range(count)]
    return Counter(item.style for scene in scenes for item in scene.objects)


def test_named_styles_are_trained_on_and_validation_keeps_the_presets(tiny: Make, pack) -> None:
    config = tiny("world.styles=[noto,noto,twemoji]")
    trained = open_stream(config, "train", 0)
    seen = styles_of(trained)
    assert set(seen) == {"noto", "twemoji"} and 1.4 < seen["noto"] / seen["twemoji"] < 2.9
    assert not any(is_held_out(trained.sample("caption", index, draw=False).meta["scene"]) for index in range(100))
    assert set(styles_of(open_stream(config, "held_out", 0))) == {"noto", "fluent"}


def test_tasks_that_share_an_index_share_the_scene_in_any_style(tiny: Make, pack) -> None:
    stream = open_stream(tiny("world.styles=[fluent,openmoji]"), "train", 3)
    for index in range(10):
        assert stream.sample("caption", index).meta["scene"] == stream.sample("generate", index).meta["scene"]


def test_named_questions_are_trained_on_and_validation_asks_all(tiny: Make, pack) -> None:
    config = tiny("world.questions=[exists,exists,count]")

    def asked(split: str) -> Counter[str]:
        stream = open_stream(config, split, 0)
        return Counter(stream.sample("answer", index, draw=False).kind for index in range(200))

    seen = asked("train")
    assert set(seen) == {"exists", "count"} and 1.4 < seen["exists"] / seen["count"] < 2.9
    assert len(asked("held_out")) == 8
    with pytest.raises(InputError, match=r"world.questions names why; expected kinds are .*exists"):
        open_stream(tiny("world.questions=[exists,why]"), "train", 0)


def test_prompts_are_reworded_in_the_presets_styles_and_classes(tiny: Make, pack) -> None:
    data = open_data(tiny("world.styles=[twemoji]", "world.others=1", "world.jitter=1"))
    for index in range(60):
        sample = data.sample("rewrite", index)
        assert not sample.sources
        assert {item.style for item in sample.meta["scene"].objects} <= {"noto", "fluent"}
        assert {item.name for item in sample.meta["scene"].objects} <= set(data.stream.preset.names)


def test_a_share_of_texts_is_learned_without_pictures(tiny: Make, pack, tokenizer_folder: Path) -> None:
    others = "perceive: 0, control: 0, compose: 0, infill: 0"
    mixture = f"mixture={{generate: 2, edit: 2, caption: 6, answer: 6, {others}}}"

    def seen(*settings: str) -> dict[str, tuple[int, int]]:
        produce = StepProducer(StepSource(tiny(mixture, *settings), tokenizer_folder))
        found: dict[str, list[int]] = {}
        for step in range(6):
            for batch in produce(step)[0]:
                for task in batch.tasks:
                    found.setdefault(task, []).append(len(batch.sources))
        return {task: (len(counts), sum(counts)) for task, counts in found.items()}

    assert seen() == {"generate": (12, 0), "edit": (12, 12), "caption": (36, 36), "answer": (36, 36)}
    blind = seen("source_dropout=0.5")
    assert blind["generate"] == (12, 0) and blind["edit"] == (12, 12)
    assert all(9 <= blind[task][1] <= 27 and blind[task][0] == 36 for task in ("caption", "answer"))
    assert seen("source_dropout=0.5") == blind


def test_a_style_that_the_pack_lacks_is_named(tiny: Make, pack) -> None:
    with pytest.raises(InputError, match=r"world.styles names crayon.*noto"):
        open_stream(tiny("world.styles=[noto,crayon]"), "train", 0)
