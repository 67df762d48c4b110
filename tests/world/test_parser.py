"""The parser is a judge: it must be right on what was drawn, honest about what was not, and repeatable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from unialignment.errors import InputError
from unialignment.world._matching import (
    CORRELATION,
    ENERGY,
    MISSING,
    apply_separable,
    blur_matrix,
    canvas_features,
    shrink_matrix,
    template_weights,
)
from unialignment.world.layout import sample_scene
from unialignment.world.parser import ACCEPT, SceneParser, match_scenes
from unialignment.world.presets import preset
from unialignment.world.render import Renderer
from unialignment.world.scene import Scene, SceneObject

Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@pytest.fixture(scope="module")
def parser(pack, nano):
    return SceneParser(pack, nano)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.rint(apply_separable(image.astype(np.float32), blur_matrix(len(image), sigma))).astype(np.uint8)


def noisy(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


def same_objects(a: Scene, b: Scene) -> bool:
    """Equal but for the order of objects that don't overlap."""
    return a.background == b.background and sorted(a.objects) == sorted(b.objects)


DEGRADATIONS: dict[str, Degrade] = {
    "clean": lambda image, rng: image,
    "blur": lambda image, rng: blurred(image, 1.0),
    "noise": lambda image, rng: noisy(image, 8, rng),
    "blur and noise": lambda image, rng: noisy(blurred(image, 1.0), 8, rng),
}


@pytest.mark.parametrize(
    ("degradation", "split", "scenes", "floor"),
    [
        ("clean", "train", 100, 0.99),
        ("clean", "held_out", 60, 0.99),
        ("blur", "train", 60, 0.97),
        ("noise", "train", 60, 0.97),
        ("blur and noise", "held_out", 30, 0.97),
    ],
)
def test_recovers_rendered_scenes(parser, nano, renderer, degradation, split, scenes, floor):
    rng = np.random.default_rng(11)
    right, backgrounds, extra = [], [], 0
    for _ in range(scenes):
        scene = sample_scene(rng, nano, split)
        parsed = parser.parse(DEGRADATIONS[degradation](renderer.render(scene), rng))
        match = match_scenes(parsed, scene)
        right += [m.found and m.style_right and m.size_right and m.position_error == 0 for m in match.objects]
        backgrounds.append(match.background_right)
        extra += match.extra
    assert np.mean(right) >= floor
    assert np.mean(backgrounds) >= floor
    assert extra <= (1 - floor) * len(right)


def test_depth_order_of_overlapping_objects(parser, nano, renderer):
    rng, right, total = np.random.default_rng(5), 0, 25
    for _ in range(total):
        scene = sample_scene(rng, nano, count=2, overlap=True)
        picture = renderer.render(scene)
        right += bool((renderer.render(parser.parse(picture).scene) == picture).all())
    assert right >= 0.95 * total


def test_sprites_off_the_lattice_are_found_where_they_are(parser, nano, renderer):
    rng = np.random.default_rng(6)
    errors = []
    for _ in range(30):
        scene = sample_scene(rng, nano, count=1)
        item = scene.objects[0]
        limit = 64 - item.size
        x, y = (int(np.clip(v + rng.integers(-2, 3), 0, limit)) for v in (item.x, item.y))
        moved = scene.with_object(0, x=x, y=y)
        match = match_scenes(parser.parse(renderer.render(moved)), moved)
        errors.append(match.objects[0].position_error if match.objects[0].style_right else np.inf)
    assert np.mean(np.array(errors) <= 1.0) >= 0.95


def mean_colour_blob(scene: Scene, renderer: Renderer) -> np.ndarray:
    """The scene's background with a Gaussian spot of each object's mean colour in its place."""
    image = renderer.render(Scene(scene.background)).astype(np.float32)
    down, right = np.mgrid[:64, :64] + 0.5
    for item in scene.objects:
        rgba = renderer.pack.rgba(item.name, item.style, item.size)
        colour = 255 * rgba[..., :3].sum((0, 1)) / rgba[..., 3].sum()
        distance = np.hypot(right - item.center[0], down - item.center[1])
        alpha = np.exp(-0.5 * (distance / (item.size / 3.5)) ** 2)[..., None]
        image = (1 - alpha) * image + alpha * colour
    return np.rint(image).astype(np.uint8)


@pytest.mark.parametrize("kind", ["background", "noisy background", "white noise", "soft noise", "blobs", "heavy blur"])
def test_accepts_nothing_where_nothing_is_drawn(parser, nano, renderer, kind):
    rng = np.random.default_rng(4)
    highest = []
    for _ in range(10 if kind != "background" else len(nano.backgrounds)):
        scene = sample_scene(rng, nano)
        empty = renderer.render(Scene(nano.backgrounds[len(highest)]))
        image = {
            "background": lambda empty=empty: empty,
            "noisy background": lambda empty=empty: noisy(empty, 8, rng),
            "white noise": lambda: rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
            "soft noise": lambda: blurred(np.clip(rng.normal(128, 700, (64, 64, 3)), 0, 255), 4.0),
            "blobs": lambda scene=scene: mean_colour_blob(scene, renderer),
            "heavy blur": lambda scene=scene: blurred(renderer.render(scene), 4.0),
        }[kind]()
        parsed = parser.parse(image)
        assert parsed.scene.objects == () and parsed.scores == ()
        highest.append(max(parsed.explanation_scores, default=0.0))
        if "background" in kind:
            assert parsed.scene.background == nano.backgrounds[len(highest) - 1]
            assert parsed.background_score > 0.95
    assert max(highest) < ACCEPT


def test_score_falls_with_blur(parser, nano, renderer):
    rng = np.random.default_rng(3)
    for _ in range(4):
        picture = renderer.render(sample_scene(rng, nano, count=1))
        scores = [max(parser.parse(blurred(picture, s)).explanation_scores, default=0.0) for s in (0.3, 1.0, 2.0, 4.0)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > 0.95 and scores[1] > 0.75 > scores[2] and scores[3] < 0.45


def test_colour_shift_is_forgiven_and_rated(parser, nano, renderer):
    rng, found = np.random.default_rng(2), []
    for _ in range(20):
        scene = sample_scene(rng, nano, count=1)
        picture = renderer.render(scene)
        shifted = np.clip(picture * 0.9 + rng.uniform(-12, 12, 3) + 12, 0, 255).astype(np.uint8)
        parsed = parser.parse(shifted)
        match = match_scenes(parsed, scene)
        found.append(match.objects[0].found and match.background_right)
        clean, rated = parser.parse(picture).explanation_scores, parsed.explanation_scores
        assert max(rated, default=0.0) < max(clean)
    assert np.mean(found) >= 0.9


def test_parsing_is_deterministic_and_independent_of_history(pack, parser, nano, renderer):
    pictures = [renderer.render(sample_scene(np.random.default_rng(seed), nano)) for seed in range(4)]
    first = [parser.parse(picture) for picture in pictures]
    fresh = SceneParser(pack, nano)
    assert [fresh.parse(picture) for picture in pictures[::-1]][::-1] == first


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        [[0, 0, 0]],
    ],
    ids=["size", "grey", "alpha", "float", "list"],
)
def test_other_pictures_are_refused_with_what_was_expected(parser, image):
    with pytest.raises(InputError, match=r"expected a uint8 picture of shape \(64, 64, 3\)"):
        parser.parse(image)


@pytest.mark.slow
def test_128_px_presets(pack):
    rng = np.random.default_rng(1)
    small = preset("small", pack)
    parser, renderer = SceneParser(pack, small), Renderer(pack, small.resolution)
    for _ in range(8):
        scene = sample_scene(rng, small)
        parsed = parser.parse(renderer.render(scene))
        assert same_objects(parsed.scene, scene)


# Matching arithmetic ------------------------------------------------------------------------------------------------


def test_gain_is_the_fall_of_the_squared_error():
    rng = np.random.default_rng(0)
    picture, behind = rng.random((2, 12, 12, 3), dtype=np.float32)
    weight = rng.random((12, 12, 1), dtype=np.float32)
    front = rng.random((12, 12, 3), dtype=np.float32) * (1 - weight)
    alpha = rng.random((5, 5, 1), dtype=np.float32)
    colour = rng.random((5, 5, 3), dtype=np.float32) * alpha
    drawn = behind.copy()
    drawn[3:8, 4:9] = (1 - alpha) * drawn[3:8, 4:9] + colour
    expected = ((picture - front - weight * behind) ** 2).sum() - ((picture - front - weight * drawn) ** 2).sum()
    features = canvas_features(picture, behind, front, weight, pad=2)[5:10, 6:11]
    totals = (features * template_weights(np.concatenate([colour, alpha], -1))).sum((0, 1))
    assert 2 * totals[CORRELATION].sum() - totals[ENERGY].sum() == pytest.approx(expected, rel=1e-4)
    missing = alpha * weight[3:8, 4:9] * (picture - front - weight * behind)[3:8, 4:9] ** 2
    assert totals[MISSING].sum() == pytest.approx(missing.sum(), rel=1e-4)


def test_blur_and_shrink_keep_means():
    flat = np.full((16, 16, 3), 0.7, np.float32)
    np.testing.assert_allclose(apply_separable(flat, blur_matrix(16, 1.5)), 0.7, rtol=1e-5)
    np.testing.assert_allclose(apply_separable(flat, shrink_matrix(16, 4, 1)), 0.7, rtol=1e-5)
    dot = np.zeros((9, 9, 1), np.float32)
    dot[4, 4] = 1
    assert apply_separable(dot, blur_matrix(9, 1.0, pad=6)).sum() == pytest.approx(1, abs=1e-4)
    assert shrink_matrix(8, 4, 1)[0].tolist() == [0, 0.25, 0.25, 0.25, 0.25, 0, 0, 0]


# Matching scenes ------------------------------------------------------------------------------------------------------

DOG = SceneObject("dog", "noto", 24, 0, 0)
CAT = SceneObject("cat", "fluent", 32, 32, 32)


def test_match_scenes_assigns_across_order():
    match = match_scenes(Scene("blue", (CAT, DOG)), Scene("blue", (DOG, CAT)))
    assert match.exact(0) and [m.parsed for m in match.objects] == [DOG, CAT]


def test_match_scenes_tells_apart_what_is_wrong():
    seen = Scene("red", (SceneObject("dog", "fluent", 32, 8, 0), SceneObject("owl", "noto", 24, 40, 40)))
    match = match_scenes(seen, Scene("blue", (DOG, CAT)))
    dog, cat = match.objects
    assert (dog.found, dog.style_right, dog.size_right) == (True, False, False)
    assert dog.position_error == pytest.approx(np.hypot(12, 4))
    assert (cat.found, cat.style_right) == (False, False) and cat.parsed is not None
    assert not match.background_right and match.extra == 0 and not match.exact()


@pytest.mark.parametrize(("seen", "expected", "extra"), [((), (DOG, CAT), 0), ((DOG, CAT, CAT), (CAT,), 2)])
def test_match_scenes_of_different_counts(seen, expected, extra):
    match = match_scenes(Scene("blue", seen), Scene("blue", expected))
    assert match.extra == extra and [m.found for m in match.objects] == [bool(seen)] * len(expected)


def test_match_scenes_prefers_the_nearer_of_twins():
    far = SceneObject("dog", "noto", 24, 40, 40)
    match = match_scenes(Scene("blue", (far, DOG)), Scene("blue", (DOG, far)))
    assert [m.position_error for m in match.objects] == [0, 0]
