"""Picture -> scene by analysis by synthesis: find the scene whose rendering explains the picture best.

The oracle that judges what a model drew. It knows the sprites and the backgrounds of one preset and uses no network: every
template at every position is scored by the squared error it would explain (``_matching``), objects are added greedily, and
the explanation is improved by re-fitting each object given all others, occlusion included. It does not know what the
picture was meant to show, and it only knows pictures, not maps.

**Scores.** An object's score (0-1) is the smaller of two fractions, each measured where the object is visible:

* *explained*: how much of the squared error that its absence would leave does its presence remove;
* *detail*: how much of the expected fine structure (what a Gaussian of ``DETAIL_SIGMA`` scene units removes) is really there.
  A soft blob of the right colour explains most of an object's error but none of its detail.

Both are measured after a Gaussian of one pixel, so that mild blur and pixel noise cost little. Objects scoring at least
``ACCEPT`` are *accepted* and make up :attr:`ParsedScene.scene`; the best explanation including rejected objects is kept in
:attr:`ParsedScene.explanation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from unialignment.errors import InputError
from unialignment.world._matching import (
    Array,
    ScanBank,
    TemplateCache,
    apply_separable,
    blur_matrix,
    canvas_features,
    pad_features,
    shrink,
)
from unialignment.world.presets import WorldPreset
from unialignment.world.render import Renderer
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.sprites import SpritePack

ACCEPT = 0.5
"""Default acceptance threshold on an object's score."""

DETAIL_SIGMA = 3.0
"""Scale of the detail score in scene units: structure coarser than this counts as colour, not as detail."""

SCAN_UNITS = 2
"""Scene units per pixel of the coarse search over all templates and positions."""

PAD_UNITS = 2
"""Room for the blur around a template, in scene units."""

MATCH_SIGMA = 1.0
"""Blur of picture and templates before matching, in pixels."""


@dataclass(frozen=True)
class ParsedScene:
    """What the parser saw.

    Attributes:
        scene: Background and accepted objects, far to near.
        scores: Score (0-1) of each accepted object.
        background_score: Fraction (0-1) of the pixels outside all explained objects whose colour is near the background's and
            nearer to it than to any other background. About 1 on clean pictures, at most about 0.5 where there is no background.
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
    """Row -> column of a cheapest assignment of ``min(rows, columns)`` pairs."""
    rows, columns = cost.shape
    if min(rows, columns) == 0:
        return {}
    if max(rows, columns) > 6:
        from scipy.optimize import linear_sum_assignment

        return {int(r): int(c) for r, c in zip(*linear_sum_assignment(cost), strict=True)}
    if rows > columns:
        return {row: column for column, row in _assign(cost.T).items()}
    best = min(permutations(range(columns), rows), key=lambda order: sum(cost[r, c] for r, c in enumerate(order)))
    return dict(enumerate(best))


@dataclass(frozen=True)
class _Placed:
    """A template on the canvas: ``key = (appearance, size)``, left and top edge in scene units."""

    key: tuple[int, int]
    x: int
    y: int


@dataclass(frozen=True)
class _Fit:
    """A placement and the squared error it explains; ``energy`` is what a perfect match would explain."""

    placed: _Placed
    gain: float
    energy: float

    @property
    def merit(self) -> float:
        """Gain, discounted when the template promised more than it explained: a sprite that covers two others does that."""
        return self.gain * float(np.clip(self.gain / max(self.energy, 1e-6), 0.0, 1.0))


class SceneParser:
    """Analysis-by-synthesis parser for the pictures of one preset.

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
        candidates: int = 12,
        sweeps: int = 2,
    ) -> None:
        self.preset, self.threshold = preset, threshold
        self._candidates, self._sweeps = candidates, sweeps
        self._side = preset.resolution
        self._unit = preset.resolution // CANVAS_UNITS
        self._pad = PAD_UNITS * self._unit
        self._shrink = SCAN_UNITS * self._unit
        self._appearances = [(name, style) for name in preset.names for style in preset.styles]
        self._smoother = blur_matrix(self._side, MATCH_SIGMA)
        self._coarser = blur_matrix(self._side, DETAIL_SIGMA * self._unit)

        def load(key: tuple[int, int]) -> Array:
            name, style = self._appearances[key[0]]
            return np.asarray(pack.rgba(name, style, key[1] * self._unit), dtype=np.float32)

        self._templates = TemplateCache(load, MATCH_SIGMA, self._pad, capacity=1024)
        self._banks = {}
        for size in preset.sizes:
            keys = tuple((index, size) for index in range(len(self._appearances)))
            stack = [shrink(self._templates.blurred(key), self._shrink) for key in keys]
            self._banks[size] = ScanBank.build(keys, stack)
        renderer = Renderer(pack, preset.resolution)
        self._backgrounds = {
            name: apply_separable(renderer.render(Scene(name)).astype(np.float32) / 255.0, self._smoother)
            for name in preset.backgrounds
        }
        # On a lattice of 4 or 8 units a scan every 4 leaves at most 2 units to local refinement, which follows anyway.
        stride = 4 if preset.lattice % 4 == 0 else 2
        self._starts = {
            size: np.unique(np.append(np.arange(0, CANVAS_UNITS - size + 1, stride), CANVAS_UNITS - size) // 2 * 2)
            for size in preset.sizes
        }

    def parse(self, image: NDArray[np.uint8]) -> ParsedScene:
        """The scene that explains ``image`` best.

        Args:
            image: ``[R, R, 3]`` uint8 with ``R`` the preset's resolution.

        Raises:
            InputError: another type or shape.
        """
        picture = self._check(image)
        best: tuple[float, str, list[_Placed]] | None = None
        for background in self._likely_backgrounds(picture):
            placed, error = self._explain(picture, self._backgrounds[background])
            if best is None or error < best[0]:
                best = error, background, placed
        assert best is not None
        return self._report(picture, *best)

    def _check(self, image: NDArray[np.uint8]) -> Array:
        expected = (self._side, self._side, 3)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise InputError(
                f"The parser of preset {self.preset.name!r} reads uint8 pictures of shape {expected}, but was given "
                f"{given}. Resize the picture and convert it to 8-bit RGB."
            )
        return apply_separable(image.astype(np.float32) / 255.0, self._smoother)

    # Background -------------------------------------------------------------------------------------------------------

    def _closeness(self, picture: Array) -> tuple[list[str], Array]:
        """Background names and how near each pixel is to each, ``[K, R, R]``, 1 = equal."""
        names = list(self._backgrounds)
        distance = np.stack([((picture - self._backgrounds[name]) ** 2).sum(-1) for name in names])
        return names, np.exp(-distance / (2 * 0.08**2))

    def _likely_backgrounds(self, picture: Array) -> list[str]:
        """The best background by a robust vote of all pixels, and a second one if it comes close."""
        names, closeness = self._closeness(picture)
        votes = closeness.mean(axis=(1, 2))
        order = np.argsort(-votes)
        if votes[order[0]] < 0.02:  # nothing near any of them (strong colour shift): take the nearest by distance
            distance = [np.median(np.abs(picture - self._backgrounds[name]).sum(-1)) for name in names]
            return [names[int(np.argmin(distance))]]
        return [names[index] for index in order[:2] if votes[index] >= 0.6 * votes[order[0]]]

    # Search -----------------------------------------------------------------------------------------------------------

    def _explain(self, picture: Array, background: Array) -> tuple[list[_Placed], float]:
        placed: list[_Placed] = []
        floor = 0.5 * self._unit**2
        error = self._error(picture, background, placed)
        for _ in range(self.preset.max_objects):
            slots = {0, len(placed)}
            options = [(slot, fit) for slot in slots if (fit := self._best_fit(picture, background, placed, slot))]
            if not options:
                break
            slot, fit = max(options, key=lambda option: option[1].merit)
            if fit.gain < floor or fit.gain < 0.2 * fit.energy:
                break
            placed.insert(slot, fit.placed)
            error -= fit.gain
        for _ in range(self._sweeps if len(placed) > 1 else 0):
            before = error
            placed, error = self._sweep(picture, background, placed)
            if error > 0.99 * before:
                break
        return placed, error

    def _sweep(self, picture: Array, background: Array, placed: list[_Placed]) -> tuple[list[_Placed], float]:
        """Re-fit every object given the others, then reorder what overlaps."""
        error = self._error(picture, background, placed)
        for index in range(len(placed)):
            others = placed[:index] + placed[index + 1 :]
            fit = self._best_fit(picture, background, others, index)
            if fit is None or fit.placed == placed[index]:
                continue
            proposal = [*others[:index], fit.placed, *others[index:]]
            proposed = self._error(picture, background, proposal)
            if proposed < error:
                placed, error = proposal, proposed
        for order in permutations(placed) if len(placed) <= 4 else ():
            proposed = self._error(picture, background, list(order))
            if proposed < 0.999 * error:
                placed, error = list(order), proposed
        return placed, error

    def _best_fit(self, picture: Array, background: Array, placed: list[_Placed], slot: int) -> _Fit | None:
        """Best additional object at depth ``slot`` (0 = behind all of ``placed``)."""
        behind = self._compose(background, placed[:slot])
        front, weight = self._front(placed[slot:])
        features = canvas_features(picture, behind, front, weight)
        fine = pad_features(features, self._pad)
        # The features are quadratic in the canvas, so the scan's are computed from the shrunk canvas, not shrunk themselves.
        small = canvas_features(
            shrink(picture, self._shrink),
            shrink(behind, self._shrink),
            None if front is None else shrink(front, self._shrink),
            None if weight is None else shrink(weight, self._shrink),
        )
        coarse = pad_features(small, 1)
        options = [self._evaluate(fine, candidate) for candidate in self._scan(coarse)]
        options = sorted(options, key=lambda fit: -fit.merit)[:3]
        return max((self._climb(fine, fit) for fit in options), key=lambda fit: fit.merit, default=None)

    def _scan(self, coarse: Array) -> list[_Placed]:
        """Candidates by merit and by gain over all templates and scan positions."""
        gains, merits, owners = [], [], []
        for size, bank in self._banks.items():
            starts = self._starts[size]
            correlation, energy = bank.scan(coarse, starts // SCAN_UNITS, starts // SCAN_UNITS)
            gain = 2 * correlation - energy
            merits.append((gain * np.clip(gain / np.maximum(energy, 1e-6), 0, 1)).ravel())
            gains.append(gain.ravel())
            owners.append((size, gain.shape))
        sizes = np.cumsum([0] + [len(part) for part in gains])
        picked: dict[_Placed, None] = {}
        for values in (np.concatenate(merits), np.concatenate(gains)):
            count = min(self._candidates, len(values))
            for index in np.argpartition(-values, count - 1)[:count]:
                which = int(np.searchsorted(sizes, index, side="right")) - 1
                size, shape = owners[which]
                template, position = divmod(int(index) - int(sizes[which]), shape[1])
                starts = self._starts[size]
                row, column = divmod(position, len(starts))
                picked[_Placed((template, size), int(starts[column]), int(starts[row]))] = None
        return list(picked)

    def _evaluate(self, fine: Array, placed: _Placed) -> _Fit:
        weights = self._templates.weights(placed.key)
        side = weights.shape[0]
        top, left = placed.y * self._unit, placed.x * self._unit
        window = fine[top : top + side, left : left + side]
        totals = np.einsum("hwc,hwc->c", window, weights)
        energy = float(totals[4:].sum())
        return _Fit(placed, 2 * float(totals[:4].sum()) - energy, energy)

    def _climb(self, fine: Array, fit: _Fit) -> _Fit:
        """Move by single units, at most two each way, while that explains more."""
        origin, tried = fit.placed, {(fit.placed.x, fit.placed.y)}
        for _ in range(4):
            start = fit
            for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)):
                x, y = start.placed.x + dx, start.placed.y + dy
                limit = CANVAS_UNITS - origin.key[1]
                if (x, y) in tried or not (0 <= x <= limit and 0 <= y <= limit):
                    continue
                if max(abs(x - origin.x), abs(y - origin.y)) > 2:
                    continue
                tried.add((x, y))
                moved = self._evaluate(fine, _Placed(origin.key, x, y))
                if moved.gain > fit.gain:
                    fit = moved
            if fit is start:
                break
        return fit

    # Synthesis --------------------------------------------------------------------------------------------------------

    def _window(self, placed: _Placed) -> tuple[tuple[slice, slice], Array]:
        """Canvas slices and the part of the blurred template that lies on the canvas."""
        rgba = self._templates.rgba(placed.key)
        top, left = placed.y * self._unit - self._pad, placed.x * self._unit - self._pad
        bottom, right = min(top + len(rgba), self._side), min(left + len(rgba), self._side)
        part = rgba[max(-top, 0) : bottom - top, max(-left, 0) : right - left]
        return (slice(max(top, 0), bottom), slice(max(left, 0), right)), part

    def _compose(self, background: Array, placed: list[_Placed]) -> Array:
        canvas = background.copy() if placed else background
        for item in placed:
            where, part = self._window(item)
            canvas[where] = (1 - part[..., 3:]) * canvas[where] + part[..., :3]
        return canvas

    def _front(self, placed: list[_Placed]) -> tuple[Array | None, Array | None]:
        """Premultiplied colour ``[R, R, 3]`` and transmittance ``[R, R, 1]`` of ``placed``."""
        if not placed:
            return None, None
        colour = np.zeros((self._side, self._side, 3), dtype=np.float32)
        weight = np.ones((self._side, self._side, 1), dtype=np.float32)
        for item in placed:
            where, part = self._window(item)
            colour[where] = (1 - part[..., 3:]) * colour[where] + part[..., :3]
            weight[where] *= 1 - part[..., 3:]
        return colour, weight

    def _error(self, picture: Array, background: Array, placed: list[_Placed]) -> float:
        return float(((picture - self._compose(background, placed)) ** 2).sum())

    # Report -----------------------------------------------------------------------------------------------------------

    def _report(self, picture: Array, error: float, background: str, placed: list[_Placed]) -> ParsedScene:
        base = self._backgrounds[background]
        scores = tuple(self._score(picture, base, placed, index) for index in range(len(placed)))
        objects = tuple(
            SceneObject(*self._appearances[item.key[0]], size=item.key[1], x=item.x, y=item.y) for item in placed
        )
        kept = [index for index, score in enumerate(scores) if score >= self.threshold]
        _, weight = self._front(placed)
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
            residual=float(np.sqrt(self._error(picture, base, placed) / picture.size)),
        )

    def _score(self, picture: Array, background: Array, placed: list[_Placed], index: int) -> float:
        present = self._compose(background, placed)
        absent = self._compose(background, placed[:index] + placed[index + 1 :])
        where, part = self._window(placed[index])
        visible = part[..., 3]
        _, weight = self._front(placed[index + 1 :])
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
        return float(np.clip(min(explained, detail), 0.0, 1.0))
