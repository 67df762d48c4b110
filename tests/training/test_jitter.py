"""Pictures that are read are changed a little, in their own way at every showing; what is drawn is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from unialignment.errors import ConfigError
from unialignment.training.config import TransformerConfig
from unialignment.training.jitter import jitter, vary_sprite
from unialignment.training.samples import open_data
from unialignment.world.render import Renderer
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import is_held_out

Make = Callable[..., TransformerConfig]


@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 80, 3)])
def test_a_picture_keeps_its_shape_and_most_of_its_look(shape: tuple[int, int, int], nano) -> None:
    picture = np.full(shape, (82, 168, 78), np.uint8)
    picture[10:30, 8:28] = (204, 52, 52)
    for seed in range(20):
        changed = jitter(picture, 1.0, np.random.default_rng(seed))
        assert changed.shape == shape and changed.dtype == np.uint8
        # The patch's middle is still red, and a far corner still green: places and colours stay true.
        patch, corner = changed[18:22, 16:20].mean((0, 1)), changed[-6:, -6:].mean((0, 1))
        assert patch[0] > patch[1] + 40 and corner[1] > corner[0] + 30


def test_strength_nothing_changes_nothing_and_a_generator_decides() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.abs(jitter(picture, 0.0, np.random.default_rng(1)).astype(int) - picture).max() <= 1
    first, again, other = (jitter(picture, 1.0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_varied_drawing_keeps_its_place_and_its_greys(pack) -> None:
    alone = Scene("gray", (SceneObject("dog", "noto", 32, 8, 16),))
    renderer, rng = Renderer(pack, 64), np.random.default_rng(0)
    plain = renderer.render(alone)
    outside = np.ones((64, 64), bool)
    outside[16:48, 8:40] = False
    seen = set()
    for _ in range(40):
        varied = renderer.render(alone, lambda *sprite: vary_sprite(*sprite, 1.0, rng))
        assert np.array_equal(varied[outside], plain[outside])
        mirrored = varied.copy()
        mirrored[16:48, 8:40] = varied[16:48, 8:40][:, ::-1]
        same, flipped = (np.abs(each.astype(int) - plain).mean() for each in (varied, mirrored))
        seen.add("same" if same < 0.5 else "mirrored" if flipped < 0.5 else "recoloured")
    assert seen == {"same", "mirrored", "recoloured"}
    # Hues turn about the grey axis: the mean of the three channels stays, white and black stay.
    color = np.float32([[[200, 40, 90], [255, 255, 255], [0, 0, 0]]])
    for seed in range(20):
        turned, _ = vary_sprite(color, np.ones_like(color), 1.0, np.random.default_rng(seed))
        assert np.allclose(np.sort(turned.mean(-1)), np.sort(color.mean(-1)), atol=1e-3)
        assert any(np.allclose(one, 255, atol=1e-3) for one in turned[0])


def test_only_what_is_read_in_training_is_changed(tiny: Make, pack) -> None:
    plain, moved = open_data(tiny()), open_data(tiny("world.jitter=1"))
    for task in ("caption", "answer"):
        one, two = plain.sample(task, 5), moved.sample(task, 5)
        assert not np.array_equal(one.sources[0], two.sources[0])
        assert np.array_equal(two.sources[0], moved.sample(task, 5).sources[0])
        assert one.target_text == two.target_text
    for task in ("generate", "edit"):
        assert np.array_equal(plain.sample(task, 5).target_image, moved.sample(task, 5).target_image)
    held = [open_data(tiny(setting), split="held_out") for setting in ("world.jitter=1", "world.jitter=0")]
    assert np.array_equal(*(data.sample("caption", 5).sources[0] for data in held))


def test_features_of_a_changed_picture_are_not_taken_for_the_scenes(tiny: Make, pack) -> None:
    data = open_data(tiny("world.jitter=1"), pool=4)
    first, later = data.sample("caption", 1), data.sample("caption", 5)
    assert first.meta["scene"] == later.meta["scene"]
    keys = {first.meta["pictures"], later.meta["pictures"], data.sample("generate", 1).meta["pictures"]}
    assert len(keys) == 3


def test_a_share_of_what_is_read_shows_any_of_the_packs_classes(tiny: Make, pack) -> None:
    plain, mixed = open_data(tiny()), open_data(tiny("world.others=0.5"))
    other = []
    for place in range(40):
        captions = plain.sample("caption", place), mixed.sample("caption", place)
        other.append(captions[0].meta["scene"] != captions[1].meta["scene"])
        # What shares an index shares its scene, or isn't called a pair.
        gaps, drawn = mixed.sample("infill", place), mixed.sample("generate", place)
        assert gaps.meta["scene"] == captions[1].meta["scene"]
        assert gaps.pair_id == captions[1].pair_id
        assert (drawn.pair_id == captions[1].pair_id) == (drawn.meta["scene"] == captions[1].meta["scene"])
        assert drawn.meta["scene"] == plain.sample("generate", place).meta["scene"]
    assert 8 <= sum(other) <= 32
    names = {item.name for place in range(40) for item in mixed.sample("caption", place).meta["scene"].objects}
    assert names - set(plain.stream.preset.names)
    assert all(
        not is_held_out(mixed.sample(task, i).meta["scene"]) for task in ("caption", "answer") for i in range(40)
    )
    held = [open_data(tiny(setting), split="held_out") for setting in ("world.others=1", "world.others=0")]
    assert held[0].sample("caption", 5).meta["scene"] == held[1].sample("caption", 5).meta["scene"]


def test_a_teacher_knows_no_other_scenes(tiny: Make) -> None:
    with pytest.raises(ConfigError, match=r"world\.others"):
        tiny("world.others=0.5", "teacher.name=package")
