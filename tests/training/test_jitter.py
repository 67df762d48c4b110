"""Pictures that are read are changed a little, in their own way at every showing; what is drawn is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from unialignment.errors import ConfigError
from unialignment.training.config import TransformerConfig
from unialignment.training.jitter import NET, _bent, _turned, jitter, recolor_sprite, relight_sprite, vary_sprite
from unialignment.training.samples import open_data
from unialignment.world.language import style_adjective
from unialignment.world.render import Renderer
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import is_held_out, is_held_out_style

Make = Callable[..., TransformerConfig]
ALONE = Scene("gray", (SceneObject("dog", "noto", 32, 8, 16),))
OUTSIDE = np.ones((64, 64), bool)
OUTSIDE[16:48, 8:40] = False


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


def test_a_recolored_drawing_keeps_its_place_and_its_greys(pack) -> None:
    renderer, rng = Renderer(pack, 64), np.random.default_rng(0)
    plain = renderer.render(ALONE)
    seen = set()
    for _ in range(40):
        varied = renderer.render(ALONE, lambda item, *sprite: recolor_sprite(*sprite, 1.0, rng))
        assert np.array_equal(varied[OUTSIDE], plain[OUTSIDE])
        mirrored = varied.copy()
        mirrored[16:48, 8:40] = varied[16:48, 8:40][:, ::-1]
        same, flipped = (np.abs(each.astype(int) - plain).mean() for each in (varied, mirrored))
        seen.add("same" if same < 0.5 else "mirrored" if flipped < 0.5 else "recoloured")
    assert seen == {"same", "mirrored", "recoloured"}
    # Hues turn about the grey axis: the mean of the three channels stays, white and black stay.
    color = np.float32([[[200, 40, 90], [255, 255, 255], [0, 0, 0]]])
    for seed in range(20):
        turned, _ = recolor_sprite(color, np.ones_like(color), 1.0, np.random.default_rng(seed))
        assert np.allclose(np.sort(turned.mean(-1)), np.sort(color.mean(-1)), atol=1e-3)
        assert any(np.allclose(one, 255, atol=1e-3) for one in turned[0])


def test_a_varied_drawing_stays_in_its_box_and_moves_within(pack) -> None:
    renderer, rng = Renderer(pack, 64), np.random.default_rng(0)
    plain = renderer.render(ALONE)
    nothing = renderer.render(ALONE, lambda item, *sprite: vary_sprite(*sprite, 0.0, rng))
    assert np.abs(nothing.astype(int) - plain).max() <= 2
    changes = []
    for _ in range(40):
        varied = renderer.render(ALONE, lambda item, *sprite: vary_sprite(*sprite, 1.0, rng))
        assert np.array_equal(varied[OUTSIDE], plain[OUTSIDE])
        changes.append(np.abs(varied.astype(int) - plain)[~OUTSIDE].mean())
    assert min(changes) < 8 < 20 < max(changes)


def test_a_drawing_is_turned_and_stretched_as_said() -> None:
    alpha = np.zeros((32, 32, 3), np.float32)
    alpha[6:12, 13:19] = 1  # above the middle
    color = alpha * np.float32([200, 100, 50])

    def center(image: np.ndarray) -> tuple[float, float]:
        rows, columns = np.nonzero(image[..., 0] > 0.5)
        return float(rows.mean()), float(columns.mean())

    same = _turned(color, alpha, 0.0, 1.0, 1.0)
    assert np.allclose(same[0], color) and np.allclose(same[1], alpha)
    row, column = center(_turned(color, alpha, math.pi / 2, 1.0, 1.0)[1])
    assert abs(row - 15.5) < 1 and abs(abs(column - 15.5) - 7) < 1
    wide, tall = (_turned(color, alpha, 0.0, *sizes)[1][..., 0] > 0.5 for sizes in ((1.5, 1.0), (1.0, 1.5)))
    assert abs(int(wide.any(0).sum()) - 9) <= 1 and wide.any(1).sum() == 6
    assert abs(int(tall.any(1).sum()) - 9) <= 1 and tall.any(0).sum() == 6


def test_a_drawing_is_bent_as_its_net_is_moved() -> None:
    rng = np.random.default_rng(3)
    alpha = np.ones((32, 32, 3), np.float32)
    color = np.float32(rng.integers(0, 256, (32, 32, 3)))
    still = np.zeros((NET + 1, NET + 1, 2))
    assert np.allclose(_bent(color, alpha, still)[0], color) and np.allclose(_bent(color, alpha, still)[1], alpha)
    # All corners look two pixels further right and one further down: what is there comes left and up.
    moved = _bent(color, alpha, np.full_like(still, 1) * (2 / 32, 1 / 32))[0]
    assert np.allclose(moved[:31, :30], color[1:, 2:])
    one = still.copy()
    one[0, 0] = 0.1  # only the mesh at that corner changes
    changed = np.abs(_bent(color, alpha, one)[0] - color).max(-1) > 1
    mesh = round(32 / NET)
    assert changed[:mesh, :mesh].mean() > 0.5 and not changed[mesh:].any() and not changed[:, mesh:].any()


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


def test_another_hands_drawing_is_as_large_and_as_solid(nano) -> None:
    rng = np.random.default_rng(4)
    alpha = np.zeros((32, 32, 3), np.float32)
    alpha[4:28, 6:26] = 1
    color = alpha * np.float32(rng.integers(40, 200, (32, 32, 3)))
    kept = (color.copy(), alpha.copy())
    different = 0
    for seed in range(40):
        new, solid = relight_sprite(color, alpha, 1.0, np.random.default_rng(seed))
        again, _ = relight_sprite(color, alpha, 1.0, np.random.default_rng(seed))
        assert np.array_equal(solid, alpha) and new.shape == color.shape and np.array_equal(new, again)
        assert not new[alpha == 0].any() and new.min() >= 0
        different += not np.allclose(new, color)
    assert 30 <= different < 40  # each of three changes is left out half of the time
    assert np.array_equal(color, kept[0]) and np.array_equal(alpha, kept[1])


def test_styles_are_not_learned_from_drawings_in_another_hand(tiny: Make, pack) -> None:
    changed = open_data(tiny("world.jitter=1", "world.relit=1"))
    plain = open_data(tiny("world.jitter=1"))
    given = 0
    for place in range(40):
        caption, before = changed.sample("caption", place), plain.sample("caption", place)
        styles = {style_adjective(item.style) for item in caption.meta["scene"].objects}
        said = {caption.target_text[start:end] for start, end in caption.given}
        assert said == {style for style in styles if style in caption.target_text.replace(",", "").split()}
        assert caption.target_text == before.target_text and not before.given
        assert not np.array_equal(caption.sources[0], before.sources[0])
        question, same = changed.sample("answer", place), plain.sample("answer", place)
        about_style = question.kind == "style" or any(
            style in f"{question.prompt} {question.target_text}" for style in ("flat", "shaded")
        )
        assert np.array_equal(question.sources[0], same.sources[0]) == about_style
        given += about_style
    assert 0 < given < 40


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


def test_a_share_of_what_is_copied_shows_any_of_the_packs_classes(tiny: Make, pack) -> None:
    plain, mixed = open_data(tiny()), open_data(tiny("world.others_copied=0.5"))
    for task in ("edit", "compose", "perceive"):
        other = [plain.sample(task, i).meta["scene"] != mixed.sample(task, i).meta["scene"] for i in range(40)]
        assert 8 <= sum(other) <= 32
        assert not any(is_held_out(mixed.sample(task, i).meta["scene"]) for i in range(40))
    for task in ("generate", "control", "caption", "answer"):
        assert all(plain.sample(task, i).meta["scene"] == mixed.sample(task, i).meta["scene"] for i in range(20))
    keys = {plain.sample("edit", i).meta["pictures"] for i in range(40)}
    assert len(keys | {mixed.sample("edit", i).meta["pictures"] for i in range(40)}) > 48


def test_what_an_edit_keeps_is_recolored_alike_and_what_is_new_is_not(tiny: Make, pack) -> None:
    plain, changed = open_data(tiny()), open_data(tiny("world.recolored=1"))
    differ = kept = new = 0
    for task in ("edit", "compose"):
        for place in range(60):
            one, two = plain.sample(task, place), changed.sample(task, place)
            assert (one.prompt, one.meta["scene"]) == (two.prompt, two.meta["scene"])
            assert one.meta["pictures"] != two.meta["pictures"]
            differ += any(not np.array_equal(a, b) for a, b in zip(one.sources, two.sources, strict=True))
            again = changed.sample(task, place)
            assert np.array_equal(two.target_image, again.target_image)
            if task != "edit":
                continue
            source, result = two.meta["source"], two.meta["scene"]
            given = {(item.name, item.style) for item in source.objects}
            for item in result.objects:
                box = (slice(item.y, item.y + item.size), slice(item.x, item.x + item.size))
                if any(item.overlap(each) for scene in (source, result) for each in scene.objects if each != item):
                    continue
                if item in source.objects and source.background == result.background:
                    assert np.array_equal(two.sources[0][box], two.target_image[box])
                    kept += not np.array_equal(one.target_image[box], two.target_image[box])
                elif (item.name, item.style) not in given:
                    assert np.array_equal(one.target_image[box], two.target_image[box])
                    new += 1
    assert kept > 20 and new > 10
    assert differ > 60
    held = [open_data(tiny(setting), split="held_out") for setting in ("world.recolored=1", "world.recolored=0")]
    assert np.array_equal(*(data.sample("edit", 5).target_image for data in held))


def test_styles_of_a_class_with_a_withheld_drawing_are_shown_and_not_learned(tiny: Make, pack) -> None:
    plain, opened = open_data(tiny()), open_data(tiny("world.open_styles=true"))
    preset = plain.stream.preset
    withheld = {name for name in preset.names if any(is_held_out_style(name, style) for style in preset.styles)}
    adjectives = {style_adjective(style) for style in preset.styles}
    given = asked = left_out = 0
    for place in range(200):
        one, two = plain.sample("caption", place), opened.sample("caption", place)
        assert one.target_text == two.target_text and not one.given
        assert two.target_text is not None
        expected = [item for item in two.meta["scene"].objects if item.name in withheld]
        # Equal objects are named once.
        assert len(two.given) == len({(item.name, item.style, item.size) for item in expected})
        for start, stop in two.given:
            assert two.target_text[start:stop] in adjectives
            given += 1
        one, two = plain.sample("answer", place), opened.sample("answer", place)
        if one.kind == "style" and one.target_text in adjectives:
            assert two.target_text not in adjectives or not any(name in two.prompt for name in withheld)
            asked += 1
            left_out += one.prompt != two.prompt
        else:
            assert one.prompt == two.prompt and not two.given
    assert given > 10 and asked > left_out > 0
    for task in ("generate", "edit"):
        assert plain.sample(task, 3).prompt == opened.sample(task, 3).prompt
    held = open_data(tiny("world.open_styles=true"), split="held_out")
    assert not any(held.sample("caption", i).given for i in range(20))


def test_a_teacher_knows_no_other_scenes(tiny: Make) -> None:
    for name in ("others", "others_copied", "recolored"):
        with pytest.raises(ConfigError, match=rf"world\.{name}: "):
            tiny(f"world.{name}=0.5", "teacher.name=package")
