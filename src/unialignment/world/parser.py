"""Picture -> scene by analysis by synthesis: the scene whose rendering explains the picture best.

The oracle that judges what a model drew. It knows the sprites and the backgrounds of one preset and uses no network:
every template at every position is scored by the squared error it would explain (``_matching``), objects are added
greedily, and the explanation is improved by re-fitting each object given all others, occlusion and blur included
(``_search``). It does not know what the picture was meant to show, and it only reads pictures, not maps.

**Scores.** An object's score (0-1) is the smaller of two fractions, each measured where the object is visible:

* *explained*: how much of the squared error that its absence would leave does its presence remove;
* *detail*: how much of the expected fine structure (what a Gaussian of ``DETAIL_SIGMA`` scene units removes) is really
  there. A soft blob of the right colour explains most of an object's error but none of its detail.

Both are measured against the sharp sprite after a Gaussian of one pixel on both sides, so that mild blur and pixel
noise cost little. Objects scoring at least ``ACCEPT`` are *accepted* and make up :attr:`ParsedScene.scene`; the best
explanation including rejected objects is kept in :attr:`ParsedScene.explanation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unialignment.errors import InputError
from unialignment.world._matching import (
    Array,
    Key,
    ScanBank,
    TemplateCache,
    apply_separable,
    blur_matrix,
    shrink_matrix,
)
from unialignment.world._search import Geometry, Placed, Search, Synthesis, depth_orders
from unialignment.world.presets import WorldPreset
from unialignment.world.render import background_image
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.sprites import MASTER_PX, SpritePack, area_weights

ACCEPT = 0.5
"""Default acceptance threshold on an object's score."""

DETAIL_SIGMA = 3.0
"""Scale of the detail score in scene units: structure coarser than this counts as colour, not as detail."""

SCAN_UNITS = 2
"""Scene units per pixel of the coarse search over all templates and positions."""

PAD_UNITS = 4
"""Room for the blur around a template, in scene units."""

SCAN_PAD = 1
"""The same in the coarse search, in its pixels."""

MATCH_SIGMA = 1.0
"""Blur of picture and templates before matching, in pixels."""

BACKGROUND_TOLERANCE = 0.08
"""Standard deviation of the robust vote for a background: RGB distance on the 0-1 scale."""

ENOUGH_VISIBLE = 0.25
"""Objects of which less than this fraction is visible have their score reduced in proportion: almost any sprite hidden
behind another would explain the few pixels that show."""

BLUR_LEVELS = (1.5, 2.1)
"""Blurs of the templates tried besides ``MATCH_SIGMA`` when the picture itself is not sharp, in pixels at 64 px; the
last one grows with the resolution."""


@dataclass(frozen=True)
class ParsedScene:
    """What the parser saw.

    Attributes:
        scene: Background and accepted objects, far to near.
        scores: Score (0-1) of each accepted object.
        background_score: Fraction (0-1) of the pixels outside all explained objects whose colour is near the
            background's and nearer to it than to any other background. About 1 on clean pictures.
        explanation: Best explanation, rejected objects included.
        explanation_scores: Score of each object of ``explanation``.
        residual: Root mean square difference (0-1 scale) between the smoothed picture and the smoothed explanation.
    """

    scene: Scene
    scores: tuple[float, ...]
    background_score: float
    explanation: Scene
    explanation_scores: tuple[float, ...]
    residual: float

    def accepted(self, threshold: float) -> Scene:
        """The scene at another acceptance threshold than the parser's."""
        pairs = zip(self.explanation.objects, self.explanation_scores, strict=True)
        return Scene(self.explanation.background, tuple(item for item, score in pairs if score >= threshold))


@dataclass(frozen=True)
class ObjectMatch:
    """How one expected object fared.

    Attributes:
        expected: The object that should be there.
        parsed: Parsed object assigned to it, or ``None``.
        found: An object of the right class was assigned.
        style_right: ... and of the right style.
        size_right: ... and of the right size.
        position_error: Distance between the centres in scene units; ``inf`` when no object was assigned.
        score: The parser's score of the assigned object, 0 if none.
    """

    expected: SceneObject
    parsed: SceneObject | None
    found: bool
    style_right: bool
    size_right: bool
    position_error: float
    score: float


@dataclass(frozen=True)
class SceneMatch:
    """Comparison of a parsed scene with the expected one.

    Attributes:
        objects: One entry per expected object, in the expected scene's order.
        extra: Accepted objects that were assigned to no expected one.
        background_right: The background's name is right.
    """

    objects: tuple[ObjectMatch, ...]
    extra: int
    background_right: bool

    def exact(self, tolerance: float = 2.0) -> bool:
        """Everything right, nothing extra, every centre within ``tolerance`` scene units."""
        return (
            self.background_right
            and self.extra == 0
            and all(m.found and m.style_right and m.size_right and m.position_error <= tolerance for m in self.objects)
        )


def match_scenes(parsed: ParsedScene | Scene, expected: Scene) -> SceneMatch:
    """Assign parsed objects to expected ones optimally: right class first, then style, then size, then nearness.

    Args:
        parsed: Parser output (its accepted objects count) or any scene.
        expected: What should be there.
    """
    scene = parsed.scene if isinstance(parsed, ParsedScene) else parsed
    scores = parsed.scores if isinstance(parsed, ParsedScene) else (1.0,) * len(scene.objects)
    wanted, seen = expected.objects, scene.objects
    cost = np.array([[_mismatch(a, b) for b in seen] for a in wanted]).reshape(len(wanted), len(seen))
    assigned = _assign(cost)
    matches = []
    for row, item in enumerate(wanted):
        column = assigned.get(row)
        other = None if column is None else seen[column]
        found = other is not None and other.name == item.name
        distance = np.inf if other is None else float(np.hypot(*np.subtract(other.center, item.center)))
        matches.append(
            ObjectMatch(
                expected=item,
                parsed=other,
                found=found,
                style_right=found and other is not None and other.style == item.style,
                size_right=found and other is not None and other.size == item.size,
                position_error=distance,
                score=0.0 if column is None else scores[column],
            )
        )
    return SceneMatch(tuple(matches), len(seen) - len(assigned), scene.background == expected.background)


def _mismatch(a: SceneObject, b: SceneObject) -> float:
    distance = float(np.hypot(*np.subtract(a.center, b.center))) / (2 * CANVAS_UNITS)
    return 100.0 * (a.name != b.name) + 10.0 * (a.style != b.style) + 3.0 * (a.size != b.size) + 6.0 * distance


def _assign(cost: NDArray[np.float64]) -> dict[int, int]:
    """Row -> column of a cheapest assignment of ``min(rows, columns)`` pairs (dynamic programming over column sets)."""
    rows, columns = cost.shape
    if rows > columns:
        return {row: column for column, row in _assign(cost.T).items()}
    best: dict[frozenset[int], tuple[float, dict[int, int]]] = {frozenset(): (0.0, {})}
    for row in range(rows):
        grown: dict[frozenset[int], tuple[float, dict[int, int]]] = {}
        for taken, (total, pairs) in best.items():
            for column in set(range(columns)) - taken:
                key, value = taken | {column}, total + float(cost[row, column])
                if key not in grown or value < grown[key][0]:
                    grown[key] = value, {**pairs, row: column}
        best = grown
    return min(best.values(), key=lambda entry: entry[0])[1]


class SceneParser:
    """Analysis-by-synthesis parser for the pictures of one preset.

    Not safe for use by several threads at once (it keeps recently used templates).

    Args:
        pack: The sprites.
        preset: Which classes, styles, sizes and backgrounds there can be, and how many objects.
        threshold: Objects scoring at least this are accepted.
        candidates: Coarse candidates kept per object; more is slower and surer.
        sweeps: Most rounds of re-fitting every object given the others.
    """

    def __init__(
        self,
        pack: SpritePack,
        preset: WorldPreset,
        threshold: float = ACCEPT,
        candidates: int = 16,
        sweeps: int = 3,
    ) -> None:
        self.preset, self.threshold = preset, threshold
        self._candidates, self._sweeps = candidates, sweeps
        side, unit = preset.resolution, preset.resolution // CANVAS_UNITS
        self._side, self._unit = side, unit
        self._pack = pack
        self._appearances = [(name, style) for name in preset.names for style in preset.styles]
        self._smoother = blur_matrix(side, MATCH_SIGMA)
        self._coarser = blur_matrix(side, DETAIL_SIGMA * unit)
        self._geometry = Geometry(
            side=side,
            unit=unit,
            pad=PAD_UNITS * unit,
            scan=tuple(shrink_matrix(side, SCAN_UNITS * unit, phase * unit) for phase in range(self._phases())),
            scan_pad=SCAN_PAD,
            scan_units=SCAN_UNITS,
        )
        sigmas = (MATCH_SIGMA, *BLUR_LEVELS[:-1], BLUR_LEVELS[-1] * max(1.0, 0.75 * unit))
        self._levels = [
            Synthesis(self._geometry, TemplateCache(self._load, sigma, PAD_UNITS * unit, capacity=512))
            for sigma in sigmas
        ]
        self._blurs = [blur_matrix(side, sigma) for sigma in sigmas]
        self._sharp = Synthesis(self._geometry, TemplateCache(self._load, 1e-3, PAD_UNITS * unit, capacity=512))
        self._banks = self._build_banks()
        self._backgrounds = {
            name: apply_separable(background_image(name, side).astype(np.float32) / 255.0, self._smoother)
            for name in preset.backgrounds
        }

    def _phases(self) -> int:
        """Free positions are searched unit by unit: thin outlines half a scan pixel off match nothing."""
        return 1 if self.preset.lattice % SCAN_UNITS == 0 else SCAN_UNITS

    def _load(self, key: Key) -> Array:
        name, style = self._appearances[key[0]]
        return np.asarray(self._pack.rgba(name, style, key[1] * self._unit), dtype=np.float32)

    def _build_banks(self) -> dict[int, ScanBank]:
        """Scan templates straight from the masters: the pack would keep every sprite asked for at full resolution."""
        factor, scans = SCAN_UNITS * self._unit, {}
        for size in self.preset.sizes:
            px = size * self._unit
            blur = blur_matrix(px, MATCH_SIGMA, SCAN_PAD * factor)
            scans[size] = shrink_matrix(len(blur), factor) @ blur @ area_weights(MASTER_PX, px)
        templates: dict[int, list[Array]] = {size: [] for size in self.preset.sizes}
        for name, style in self._appearances:
            master = self._pack.master(name, style).astype(np.float32) / 255.0
            master[..., :3] *= master[..., 3:]
            for size, scan in scans.items():
                templates[size].append(apply_separable(master, scan))
        # On a lattice of 4 or 8 units a scan every 4 leaves at most 2 units to the local refinement that follows.
        stride = 4 if self.preset.lattice % 4 == 0 else SCAN_UNITS
        banks = {}
        for size, stack in templates.items():
            starts = np.unique(np.append(np.arange(0, CANVAS_UNITS - size + 1, stride), CANVAS_UNITS - size))
            banks[size] = ScanBank.build(stack, starts // SCAN_UNITS)
        return banks

    def parse(self, image: NDArray[np.uint8]) -> ParsedScene:
        """The scene that explains ``image`` best.

        Args:
            image: ``[R, R, 3]`` uint8 with ``R`` the preset's resolution.

        Raises:
            InputError: another type or shape.
        """
        picture = self._check(image)
        options = []
        for name in self._likely_backgrounds(picture):
            ground = self._tinted(picture, name)
            options.append((name, ground, *self._explain(picture, ground)))
        return self._report(picture, *min(options, key=lambda option: option[3]))

    def _check(self, image: NDArray[np.uint8]) -> Array:
        expected = (self._side, self._side, 3)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise InputError(
                f"the parser of preset {self.preset.name!r} was given {given}, expected a uint8 picture of shape "
                f"{expected}: resize the picture and convert it to 8-bit RGB"
            )
        return apply_separable(image.astype(np.float32) / 255.0, self._smoother)

    def _closeness(self, picture: Array) -> tuple[list[str], Array]:
        """Background names and how near each pixel is to each, ``[K, R, R]``, 1 = equal."""
        names = list(self._backgrounds)
        distance = np.stack([((picture - self._backgrounds[name]) ** 2).sum(-1) for name in names])
        return names, np.exp(-distance / (2 * BACKGROUND_TOLERANCE**2))

    def _likely_backgrounds(self, picture: Array) -> list[str]:
        """The best background by a robust vote of all pixels, and a second one if it comes close."""
        names, closeness = self._closeness(picture)
        votes = closeness.mean(axis=(1, 2))
        order = np.argsort(-votes)
        if votes[order[0]] < 0.02:  # nothing near any of them (strong colour shift): take the nearest by distance
            distance = [np.median(np.abs(picture - self._backgrounds[name]).sum(-1)) for name in names]
            return [names[int(np.argmin(distance))]]
        return [names[index] for index in order[:2] if votes[index] >= 0.6 * votes[order[0]]]

    def _tinted(self, picture: Array, name: str) -> Array:
        """The background with the picture's colour cast, so that objects needn't explain it."""
        ground = self._backgrounds[name]
        difference = picture - ground
        near = (difference * difference).sum(-1) < (2.5 * BACKGROUND_TOLERANCE) ** 2
        if near.mean() < 0.05:
            return ground
        cast = np.median(difference[near], axis=0)
        return ground + cast * (np.abs(cast) > 0.01)

    def _explain(self, picture: Array, background: Array) -> tuple[list[Placed], float]:
        """Explain with sharp templates, then with blurrier ones while those fit the found objects better."""

        def search(level: Synthesis) -> Search:
            most = self.preset.max_objects
            return Search(level, self._banks, picture, background, most, self._candidates, self._sweeps)

        searches = [search(level) for level in self._levels]
        level = 0
        placed, error = searches[0].run()
        while placed:
            errors = [item.error(placed) for item in searches]
            sharper = level
            level = int(np.argmin(errors))
            if level <= sharper or errors[level] > 0.97 * error:
                level = sharper
                break
            results = (searches[level].run(), searches[level].run(placed))
            placed, error = min(results, key=lambda result: result[1])
        placed, error = searches[level].reconsider(placed)
        for _ in range(2):
            ordered = self._order(picture, background, placed, level)
            placed = searches[level].polish(ordered)
            if placed == ordered:
                break
        return placed, searches[level].error(placed)

    def _order(self, picture: Array, background: Array, placed: list[Placed], level: int) -> list[Placed]:
        """Depth order by exact synthesis: the search blurs sprites one by one, which blurs who covers whom."""

        def error(order: Sequence[Placed]) -> float:
            drawn = apply_separable(self._sharp.compose(background, order), self._blurs[level])
            return float(((picture - drawn) ** 2).sum())

        return min(depth_orders(placed), key=error)

    def _report(self, picture: Array, background: str, base: Array, placed: list[Placed], error: float) -> ParsedScene:
        scores = tuple(self._score(picture, base, placed, index) for index in range(len(placed)))
        objects = tuple(self._object(item) for item in placed)
        kept = [index for index, score in enumerate(scores) if score >= self.threshold]
        _, weight = self._levels[0].front(placed)
        free = np.ones((self._side, self._side), bool) if weight is None else weight[..., 0] > 0.98
        names, closeness = self._closeness(picture)
        chosen = names.index(background)
        near = (closeness[chosen] >= closeness.max(axis=0)) & (closeness[chosen] > np.exp(-2.0))
        return ParsedScene(
            scene=Scene(background, tuple(objects[index] for index in kept)),
            scores=tuple(scores[index] for index in kept),
            background_score=float(near[free].mean()) if free.any() else 0.0,
            explanation=Scene(background, objects),
            explanation_scores=scores,
            residual=float(np.sqrt(error / picture.size)),
        )

    def _object(self, item: Placed) -> SceneObject:
        """The scene object, moved into the canvas if it was found sticking out."""
        name, style = self._appearances[item.key[0]]
        x, y = (int(np.clip(value, 0, CANVAS_UNITS - item.key[1])) for value in (item.x, item.y))
        return SceneObject(name, style, item.key[1], x, y)

    def _score(self, picture: Array, background: Array, placed: Sequence[Placed], index: int) -> float:
        """Score of one object as defined in the module's docstring, with sharp templates whatever fitted best."""
        draw = self._levels[0]
        present = draw.compose(background, placed)
        absent = draw.compose(background, [*placed[:index], *placed[index + 1 :]])
        where, part = draw.window(placed[index])
        visible = part[..., 3]
        _, weight = draw.front(placed[index + 1 :])
        if weight is not None:
            visible = visible * weight[where][..., 0]
        mask = (visible > 0.02)[..., None]
        left = (((picture - present)[where] ** 2) * mask).sum()
        without = (((picture - absent)[where] ** 2) * mask).sum()
        explained = 1 - left / max(without, 1e-6)
        expected = (present - apply_separable(present, self._coarser))[where] * mask
        missing = picture - present
        missing = (missing - apply_separable(missing, self._coarser))[where] * mask
        detail = 1 - (missing**2).sum() / max((expected**2).sum(), 1e-6)
        seen = float(visible.sum() / max(part[..., 3].sum(), 1e-6))
        return float(np.clip(min(explained, detail, seen / ENOUGH_VISIBLE), 0.0, 1.0))
