"""Pictures and maps against slow, obvious reference code; speed; backgrounds that can be told apart."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from unialignment.errors import InputError
from unialignment.world.layout import sample_scene
from unialignment.world.presets import BACKGROUNDS, WorldPreset, preset
from unialignment.world.render import DEPTH_STEP, Renderer, background_image
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.sprites import SpritePack


def reference_picture(pack: SpritePack, scene: Scene, resolution: int) -> np.ndarray:
    """The "over" operator in float64, pixel by pixel in meaning, rounded at the end."""
    canvas = background_image(scene.background, resolution).astype(np.float64) / 255
    scale = resolution // 64
    for item in scene.objects:
        sprite = pack.rgba(item.name, item.style, item.size * scale).astype(np.float64)
        window = canvas[item.y * scale :, item.x * scale :][: item.size * scale, : item.size * scale]
        window[:] = sprite[..., :3] + (1 - sprite[..., 3:]) * window
    return np.floor(canvas * 255 + 0.5).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["nano", "small", "full"])
def test_pictures_match_the_reference(pack: SpritePack, name: str) -> None:
    world = preset(name, pack)
    renderer = Renderer(pack, world.resolution)
    rng = np.random.default_rng(5)
    for overlap in (False, True, None):
        scene = sample_scene(rng, world, overlap=overlap)
        picture = renderer.render(scene)
        assert picture.shape == (world.resolution, world.resolution, 3)
        assert picture.dtype == np.uint8
        difference = np.abs(picture.astype(int) - reference_picture(pack, scene, world.resolution))
        assert difference.max() <= 1, "more than a rounding tie apart"
        assert np.array_equal(renderer.render(scene), picture)


def test_pictures_do_not_depend_on_what_was_drawn_before(pack: SpritePack, nano: WorldPreset) -> None:
    used = Renderer(pack, 64)
    scenes = [sample_scene(np.random.default_rng(seed), nano) for seed in range(20)]
    drawn = [used.render(scene) for scene in scenes]
    for scene, picture in zip(reversed(scenes), reversed(drawn), strict=True):
        assert np.array_equal(Renderer(pack, 64).render(scene), picture)
    drawn[0][:] = 0
    assert used.render(scenes[0]).any()


def two(nano: WorldPreset, near_y: int = 24) -> Scene:
    """A panda partly covering a house."""
    style = nano.styles[0]
    return Scene("blue", (SceneObject("house", style, 32, 8, 16), SceneObject("panda", style, 32, 24, near_y)))


def test_masks_show_visible_pixels_only(renderer: Renderer, nano: WorldPreset) -> None:
    scene = two(nano)
    far, near, both = (renderer.mask(scene, which) for which in (0, 1, (0, 1)))
    for mask in (far, near, both):
        assert mask.shape == (64, 64, 3)
        assert set(np.unique(mask)) == {0, 255}
        assert np.array_equal(mask[..., 0], mask[..., 2])
    assert not (far & near).any()
    assert np.array_equal(far | near, both)
    alone = renderer.mask(scene.without_object(1), 0)
    assert (alone.astype(int) - far).min() >= 0 and (alone != far).any()
    inside = near[24:56, 24:56, 0] > 0
    assert np.array_equal(inside, renderer.silhouette(scene.objects[1]))
    assert not renderer.mask(scene, ()).any()


def test_masks_match_pictures(renderer: Renderer, nano: WorldPreset) -> None:
    """Away from every mask (and its soft rim) the picture is the background."""
    for seed in range(10):
        scene = sample_scene(np.random.default_rng(seed), nano)
        covered = renderer.mask(scene, range(len(scene.objects)))[..., 0] > 0
        changed = (renderer.render(scene) != renderer.render(Scene(scene.background))).any(-1)
        assert (changed & covered).sum() > 0.9 * covered.sum()
        rim = changed & ~covered
        grown = covered.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                grown |= np.roll(covered, step, axis)
        assert (rim & ~grown).sum() < 0.1 * covered.sum()


def test_depth(renderer: Renderer, nano: WorldPreset) -> None:
    scene = two(nano)
    far, near = renderer.depth_levels(scene)
    assert near >= far + DEPTH_STEP
    depth = renderer.depth(scene)
    assert set(np.unique(depth)) == {0, far, near}
    assert np.array_equal(depth[..., 0] == near, renderer.mask(scene, 1)[..., 0] > 0)
    # A higher object would be farther, but covers the other: occlusion wins.
    far, near = renderer.depth_levels(two(nano, near_y=0))
    assert near == far + DEPTH_STEP
    # Apart, lower is nearer, whatever the drawing order.
    style = nano.styles[0]
    low, high = SceneObject("dog", style, 24, 0, 40), SceneObject("dog", style, 24, 40, 0)
    assert renderer.depth_levels(Scene("red", (low, high))) == renderer.depth_levels(Scene("red", (high, low)))[::-1]
    assert renderer.depth_levels(Scene("red", (low, high)))[0] > renderer.depth_levels(Scene("red", (low, high)))[1]
    assert not renderer.depth(Scene("red")).any()


def test_depth_levels_stay_in_range(renderer: Renderer, nano: WorldPreset) -> None:
    pile = Scene("red", tuple(SceneObject("panda", nano.styles[0], 32, 0, 32) for _ in range(9)))
    assert max(renderer.depth_levels(pile)) == 255
    assert list(renderer.depth_levels(pile)) == sorted(renderer.depth_levels(pile))


@pytest.mark.parametrize("resolution", [64, 128])
def test_edges_are_the_inner_rim_of_the_visible_parts(pack: SpritePack, nano: WorldPreset, resolution: int) -> None:
    renderer = Renderer(pack, resolution)
    scene = two(nano)
    edges = renderer.edges(scene)
    assert edges.shape == (resolution, resolution, 3)
    assert set(np.unique(edges)) == {0, 255}
    owner = renderer.visible(scene)
    white = edges[..., 0] > 0
    assert not (white & (owner == 0)).any()
    around = np.pad(owner, 1)
    shifted = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    rim = np.logical_or.reduce([owner != other for other in shifted]) & (owner > 0)
    assert not (rim & ~white).any()
    if resolution == 64:
        assert np.array_equal(rim, white)
    else:
        assert 1.5 * rim.sum() < white.sum() <= 2.2 * rim.sum(), "two pixels wide"


def test_backgrounds_can_be_told_apart() -> None:
    """Also from the gradient's far ends: no colour's top or bottom comes near another colour."""
    rows = {name: background_image(name, 64)[:, 0] for name in BACKGROUNDS}
    for first, second in combinations(rows, 2):
        gap = np.linalg.norm(rows[first][:, None] - rows[second][None], axis=-1).min()
        assert gap > 25, (first, second, gap)
    for name, column in rows.items():
        luminance = column.mean(-1)
        assert np.all(np.diff(luminance) < 0), f"{name} gets darker downwards"
        assert 2 < luminance[0] - luminance[-1] < 50, f"{name}: gentle"


@pytest.mark.parametrize(
    "scene",
    [
        Scene("mauve"),
        Scene("red", (SceneObject("gryphon", "noto", 24, 0, 0),)),
        Scene("red", (SceneObject("dog", "cubist", 24, 0, 0),)),
        Scene("red", (SceneObject("dog", "openmoji", 24, 48, 0),)),
        Scene("red", (SceneObject("dog", "openmoji", 24, 0, -8),)),
    ],
    ids=["background", "class", "style", "right", "top"],
)
def test_impossible_scenes_are_input_errors(renderer: Renderer, scene: Scene) -> None:
    with pytest.raises(InputError, match=r"mauve|gryphon|cubist|leaves the canvas"):
        renderer.render(scene)


def test_bad_indices_and_resolutions(pack: SpritePack, renderer: Renderer, nano: WorldPreset) -> None:
    with pytest.raises(InputError, match="no object 2"):
        renderer.mask(two(nano), 2)
    with pytest.raises(InputError, match="no object -1"):
        renderer.mask(two(nano), -1)
    for resolution in (0, 32, 100, -64):
        with pytest.raises(InputError, match="multiple of 64"):
            Renderer(pack, resolution)


def test_speed(renderer: Renderer, nano: WorldPreset) -> None:
    """Under 150 us of processor time for three objects at 64 px: data must never wait."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, nano, count=3) for _ in range(200)]
    for scene in scenes:
        renderer.render(scene)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for scene in scenes:
            renderer.render(scene)
        best = min(best, (time.process_time() - start) / len(scenes))
    assert best < 150e-6
