"""Searches the placements of templates that explain one picture with the least squared error.

Greedy addition behind or in front of what is already explained; then each object is re-fitted given the others, what
fits badly is dropped, and overlapping objects are reordered or, if they stay doubtful, searched anew. Knows templates
and positions, not classes, choice of background or acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from unialignment.world._matching import (
    CORRELATION,
    ENERGY,
    MISSING,
    Array,
    Key,
    ScanBank,
    TemplateCache,
    apply_separable,
    canvas_features,
)
from unialignment.world.scene import CANVAS_UNITS

GOOD_FIT = 0.93
"""Objects that explain this fraction of what they promise are left alone."""

DOUBTFUL_FIT = 0.75
"""An object that explains less than this fraction is searched anew from other first guesses."""

BAD_FIT = 0.4
"""Objects that explain less than this fraction, given all others, are dropped and searched anew."""

MOST_OVERLAP = 0.7
"""Boxes share at most half of the smaller one in this world; without a limit, two wrong sprites stacked on each other
explain a distorted one better than the right sprite does. Some slack lets a wrong first guess be corrected."""

LEAST_CONTRAST = 0.75
"""Faded sprites are looked for down to this contrast."""

OVERHANG = 2
"""How far an object may stick out of the canvas, in scene units: none should, but a model draws less exactly."""

_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1))


@dataclass(frozen=True)
class Placed:
    """A template on the canvas.

    Attributes:
        key: Which template.
        x: Left edge in scene units.
        y: Top edge in scene units.
    """

    key: Key
    x: int
    y: int

    def touches(self, other: Placed) -> bool:
        """Whether the boxes share area."""
        return (
            self.x < other.x + other.key[1]
            and other.x < self.x + self.key[1]
            and self.y < other.y + other.key[1]
            and other.y < self.y + self.key[1]
        )


@dataclass(frozen=True)
class Fit:
    """A placement and what it does for the picture.

    Attributes:
        placed: The placement.
        gain: Squared error that it explains.
        energy: Squared error that it would explain if it matched perfectly.
        merit: See :func:`merit`.
    """

    placed: Placed
    gain: float
    energy: float
    merit: float

    @property
    def quality(self) -> float:
        """Fraction (at most 1) of the promise that is kept."""
        return min(self.gain / max(self.energy, 1e-6), 1.0)


def merit(correlation: Array, energy: Array, missing: Array) -> Array:
    """How good a template is as an explanation: error explained, times its fraction of the error there is to explain.

    The discount keeps a sprite from covering two others at once, or a plain one from half explaining a richer one. The
    picture's contrast may be lower than the sprite's, down to ``LEAST_CONTRAST``.
    """
    contrast = np.clip(correlation / np.maximum(energy, 1e-6), LEAST_CONTRAST, 1.0)
    gain = contrast * (2.0 * correlation - contrast * energy)
    return np.asarray(np.maximum(gain, 0.0) * np.minimum(gain / np.maximum(missing, 1e-6), 1.0), dtype=np.float32)


@dataclass(frozen=True)
class Geometry:
    """Resolutions of the search.

    Attributes:
        side: Side of the picture in pixels.
        unit: Pixels per scene unit.
        pad: Template padding in pixels.
        scan: Matrices ``[scan side, side]`` that shrink a picture for the scan, one per phase: with more than one,
            positions between scan pixels are searched too, each offset by one scene unit from the previous.
        scan_pad: Template padding in scan pixels.
        scan_units: Scene units per scan pixel.
    """

    side: int
    unit: int
    pad: int
    scan: tuple[Array, ...]
    scan_pad: int
    scan_units: int


def depth_orders(placed: list[Placed], most: int = 5) -> list[list[Placed]]:
    """The given order first, then all others of the objects that touch another, unless these are more than ``most``."""
    touching = [a for a in placed if any(a is not b and a.touches(b) for b in placed)]
    if len(touching) < 2 or len(touching) > most:
        return [placed]
    free = [item for item in placed if item not in touching]
    return [[*free, *order] for order in permutations(touching)]


class Synthesis:
    """Draws placements with blurred templates of one sharpness."""

    def __init__(self, geometry: Geometry, templates: TemplateCache) -> None:
        self.geometry, self.templates = geometry, templates

    def window(self, placed: Placed) -> tuple[tuple[slice, slice], Array]:
        """Canvas slices and the part of the template that lies on the canvas."""
        rgba, g = self.templates.rgba(placed.key), self.geometry
        top, left = placed.y * g.unit - g.pad, placed.x * g.unit - g.pad
        bottom, right = min(top + len(rgba), g.side), min(left + len(rgba), g.side)
        part = rgba[max(-top, 0) : bottom - top, max(-left, 0) : right - left]
        return (slice(max(top, 0), bottom), slice(max(left, 0), right)), part

    def compose(self, background: Array, placed: Sequence[Placed]) -> Array:
        """``placed``, far to near, over ``background``."""
        canvas = background.copy() if placed else background
        for item in placed:
            where, part = self.window(item)
            canvas[where] = (1 - part[..., 3:]) * canvas[where] + part[..., :3]
        return canvas

    def front(self, placed: Sequence[Placed]) -> tuple[Array | None, Array | None]:
        """Premultiplied colour ``[R, R, 3]`` and transmittance ``[R, R, 1]`` of ``placed``; ``None`` for nothing."""
        if not placed:
            return None, None
        side = self.geometry.side
        colour = np.zeros((side, side, 3), dtype=np.float32)
        weight = np.ones((side, side, 1), dtype=np.float32)
        for item in placed:
            where, part = self.window(item)
            colour[where] = (1 - part[..., 3:]) * colour[where] + part[..., :3]
            weight[where] *= 1 - part[..., 3:]
        return colour, weight


class Search:
    """The search on one picture over one background at one sharpness.

    Args:
        synthesis: Draws placements.
        banks: Scan bank of every template size.
        picture: Smoothed picture ``[R, R, 3]``, 0-1.
        background: Background, likewise.
        most: Most objects.
        candidates: Coarse candidates kept per object.
        sweeps: Most rounds of re-fitting.
    """

    def __init__(
        self,
        synthesis: Synthesis,
        banks: Mapping[int, ScanBank],
        picture: Array,
        background: Array,
        most: int,
        candidates: int,
        sweeps: int,
    ) -> None:
        self._synthesis, self._banks = synthesis, banks
        self._picture, self._background = picture, background
        self._most, self._candidates, self._sweeps = most, candidates, sweeps
        # Half a white pixel on black (at 64 px): far less than any sprite, more than rounding leaves.
        self._floor = 0.5 * synthesis.geometry.unit**2
        self._margin = synthesis.geometry.pad + OVERHANG * synthesis.geometry.unit
        # The same states come up again and again: when a sweep changes nothing, from another start, in another order.
        self._canvases: dict[tuple[Placed, ...], Array] = {}
        self._errors: dict[tuple[Placed, ...], float] = {}
        self._fits: dict[tuple[tuple[Placed, ...], tuple[Placed, ...], int], list[Fit]] = {}

    def error(self, placed: Sequence[Placed]) -> float:
        """Summed squared error of drawing ``placed``."""
        key = tuple(placed)
        if key not in self._errors:
            self._errors[key] = float(((self._picture - self._compose(placed)) ** 2).sum())
        return self._errors[key]

    def _compose(self, placed: Sequence[Placed]) -> Array:
        """``placed`` over the background; not to be written to."""
        key = tuple(placed)
        if key not in self._canvases:
            self._canvases[key] = self._synthesis.compose(self._background, placed)
        return self._canvases[key]

    def run(self, start: Sequence[Placed] = ()) -> tuple[list[Placed], float]:
        """Placements found, far to near, and their error.

        Args:
            start: Placements to begin with, e.g. those found at another sharpness.
        """
        return self._improve(self._add(list(start)))

    def reconsider(self, placed: list[Placed]) -> tuple[list[Placed], float]:
        """``placed`` or a better explanation of what fits worst, and its error.

        A wrong first guess hides the right ones, above all among overlapping objects: search anew from other guesses.
        """
        best, least = placed, self.error(placed)
        for group in self._doubtful(placed):
            rest = [item for item in placed if item not in group]
            for fit in self._best_fits([], rest, 3):
                if fit.placed not in group:
                    candidate, error = self._improve(self._add(self._reorder([fit.placed, *rest])))
                    if error < least:
                        best, least = candidate, error
        return best, least

    def polish(self, placed: list[Placed]) -> list[Placed]:
        """Positions of overlapping objects fitted once more, now that depth order and neighbours are known."""
        for index, item in enumerate(placed):
            others = [*placed[:index], *placed[index + 1 :]]
            if any(item.touches(other) for other in others):
                fine = self._fine(placed[:index], placed[index + 1 :])
                moved = self._climb(fine, self._evaluate(fine, [item])[0]).placed
                placed = [*placed[:index], moved, *placed[index + 1 :]]
        return placed

    def _doubtful(self, placed: list[Placed]) -> list[tuple[Placed, ...]]:
        """The worst-fitting object, and it together with each one it touches; nothing if all fit well."""
        if not placed:
            return []
        qualities = [self._kept(placed, index) for index in range(len(placed))]
        worst = placed[int(np.argmin(qualities))]
        if min(qualities) > DOUBTFUL_FIT:
            return []
        return [(worst,)] + [(worst, other) for other in placed if other is not worst and worst.touches(other)]

    def _kept(self, placed: Sequence[Placed], index: int) -> float:
        """How much of the error in its window (0-1) an object removes: 1 when what is left is nothing."""
        where, _ = self._synthesis.window(placed[index])
        others = [*placed[:index], *placed[index + 1 :]]
        left, without = (
            float(((self._picture[where] - self._compose(items)[where]) ** 2).sum()) for items in (placed, others)
        )
        return 1.0 - left / max(without, 1e-6)

    def _improve(self, placed: list[Placed]) -> tuple[list[Placed], float]:
        """Refit until nothing changes."""
        best, least = placed, self.error(placed)
        for _ in range(self._sweeps):
            if not placed:
                break
            placed, changed = self._refit(placed)
            if changed:
                placed = self._add(placed)
            error = self.error(placed)
            improved = error < 0.98 * least
            if error < least:
                best, least = placed, error
            if not (changed and improved):
                break
        return best, least

    def _add(self, placed: list[Placed]) -> list[Placed]:
        """Add objects while they explain something."""
        while len(placed) < self._most:
            if self.error(placed) < self._floor:
                break
            # Behind everything, occupied pixels count as unknown; in front, what a wrong object hides is won back.
            fits = [self._best_fit([], placed)]
            if any(self._kept(placed, index) < GOOD_FIT for index in range(len(placed))):
                fits.append(self._best_fit(placed, []))
            fit = max((fit for fit in fits if fit is not None), key=lambda fit: fit.merit, default=None)
            if fit is None or fit.gain < self._floor or fit.quality < 0.05:
                break
            placed = self._reorder([fit.placed, *placed])
        return placed

    def _refit(self, placed: list[Placed]) -> tuple[list[Placed], bool]:
        """Fit every object that does not fit well anew, given the others; drop what then still fits badly."""
        original, error, poor = list(placed), self.error(placed), []
        for item in original:
            others = [other for other in placed if other is not item]
            index = placed.index(item)
            if self._kept(placed, index) >= GOOD_FIT:
                continue
            current = self._evaluate(self._fine(others[:index], others[index:]), [item])[0]
            depths = range(len(placed)) if any(item.touches(other) for other in others) else (index,)
            for depth in depths:
                fit = self._best_fit(others[:depth], others[depth:])
                if fit is None:
                    continue
                proposal = self._reorder([*others[:depth], fit.placed, *others[depth:]])
                proposed = self.error(proposal)
                if proposed < error:
                    placed, error, current = proposal, proposed, fit
            if current.quality < BAD_FIT or current.gain < self._floor:
                poor.append(current.placed)
        placed = [item for item in placed if item not in poor]
        return placed, placed != original

    def _reorder(self, placed: list[Placed]) -> list[Placed]:
        """The depth order that explains most."""
        orders = depth_orders(placed)
        return placed if len(orders) == 1 else min(orders, key=self.error)

    def _fine(self, behind: Sequence[Placed], front: Sequence[Placed]) -> Array:
        return canvas_features(
            self._picture,
            self._compose(behind),
            *self._synthesis.front(front),
            self._margin,
        )

    def _best_fit(self, behind: Sequence[Placed], front: Sequence[Placed]) -> Fit | None:
        """Best additional object between ``behind`` and ``front``."""
        return next(iter(self._best_fits(behind, front, 1)), None)

    def _best_fits(self, behind: Sequence[Placed], front: Sequence[Placed], count: int) -> list[Fit]:
        """Best additional objects between ``behind`` and ``front``, best first, no two the same template."""
        key = tuple(behind), tuple(front), count
        if key not in self._fits:
            self._fits[key] = self._find_fits(behind, front, count)
        return self._fits[key]

    def _find_fits(self, behind: Sequence[Placed], front: Sequence[Placed], count: int) -> list[Fit]:
        g = self._synthesis.geometry
        canvas = self._compose(behind)
        layers = self._synthesis.front(front)
        fine = canvas_features(self._picture, canvas, *layers, self._margin)
        allowed = {size: self._allowed(size, [*behind, *front]) for size in self._banks}
        picked: dict[Placed, None] = {}
        for dy, rows in enumerate(g.scan):
            for dx, columns in enumerate(g.scan):
                # Features are quadratic in the canvas, so the canvas is shrunk, not they.
                picture, ground = apply_separable(self._picture, rows, columns), apply_separable(canvas, rows, columns)
                front_small, weight_small = (None if x is None else apply_separable(x, rows, columns) for x in layers)
                small = canvas_features(picture, ground, front_small, weight_small, g.scan_pad)
                picked |= dict.fromkeys(self._scan(small, allowed, dx, dy))
        options = sorted(self._evaluate(fine, list(picked)), key=lambda fit: -fit.merit)
        chosen: dict[Key, Fit] = {}
        for option in options[: 2 + count]:
            fit = self._climb(fine, option)
            if fit.placed.key not in chosen or fit.merit > chosen[fit.placed.key].merit:
                chosen[fit.placed.key] = fit
        return sorted(chosen.values(), key=lambda fit: -fit.merit)[:count]

    def _allowed(self, size: int, others: Sequence[Placed]) -> NDArray[np.int64]:
        """The scan positions of a template size that don't overlap ``others`` too much."""
        starts = self._banks[size].starts * self._synthesis.geometry.scan_units
        allowed = np.ones((len(starts), len(starts)), dtype=bool)
        for other in others:
            width = np.minimum(starts + size, other.x + other.key[1]) - np.maximum(starts, other.x)
            height = np.minimum(starts + size, other.y + other.key[1]) - np.maximum(starts, other.y)
            shared = np.maximum(height, 0)[:, None] * np.maximum(width, 0)[None]
            allowed &= shared <= MOST_OVERLAP * min(size, other.key[1]) ** 2
        return np.flatnonzero(allowed)

    def _scan(self, coarse: Array, allowed: Mapping[int, NDArray[np.int64]], dx: int, dy: int) -> list[Placed]:
        """Candidates by merit and by gain over all templates and scan positions."""
        gains, merits, owners = [], [], []
        for size, bank in self._banks.items():
            where = allowed[size]
            if not where.size:
                continue
            correlation, energy, missing = bank.scan(coarse, where)
            gain = 2 * correlation - energy
            index = np.flatnonzero(gain > 0.3 * gain.max())
            index = index[gain.ravel()[index] > 0]
            gains.append(gain.ravel()[index])
            merits.append(merit(correlation.ravel()[index], energy.ravel()[index], missing.ravel()[index]))
            template, place = np.divmod(index, where.size)
            owners += [(size, *pair) for pair in zip(template.tolist(), where[place].tolist(), strict=True)]
        if not owners:
            return []
        picked: dict[Placed, None] = {}
        for values in (np.concatenate(merits), np.concatenate(gains)):
            count = min(self._candidates, len(values))
            for choice in np.argpartition(-values, count - 1)[:count]:
                picked[self._place(*owners[int(choice)], dx, dy)] = None
        return list(picked)

    def _place(self, size: int, template: int, position: int, dx: int, dy: int) -> Placed:
        starts = self._banks[size].starts * self._synthesis.geometry.scan_units
        row, column = divmod(position, len(starts))
        limit = CANVAS_UNITS - size
        return Placed((template, size), min(int(starts[column]) + dx, limit), min(int(starts[row]) + dy, limit))

    def _evaluate(self, fine: Array, placements: Sequence[Placed]) -> list[Fit]:
        """What each placement does for the picture, ``fine`` being its features at full resolution."""
        unit = self._synthesis.geometry.unit
        totals = np.empty((len(placements), fine.shape[-1]), dtype=np.float32)
        for index, item in enumerate(placements):
            weights = self._synthesis.templates.weights(item.key)
            side = weights.shape[0]
            top, left = (item.y + OVERHANG) * unit, (item.x + OVERHANG) * unit
            np.einsum("hwc,hwc->c", fine[top : top + side, left : left + side], weights, out=totals[index])
        correlation, energy, missing = (totals[:, part].sum(axis=1) for part in (CORRELATION, ENERGY, MISSING))
        columns = 2 * correlation - energy, energy, merit(correlation, energy, missing)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Fit(item, *row) for item, row in zip(placements, rows, strict=True)]

    def _climb(self, fine: Array, fit: Fit) -> Fit:
        """Move by single units, at most two each way, while that explains more."""
        origin, tried = fit.placed, {(fit.placed.x, fit.placed.y)}
        low, high = -OVERHANG, CANVAS_UNITS - origin.key[1] + OVERHANG
        for _ in range(4):
            start, near = fit, []
            for dx, dy in _NEIGHBOURS:
                x, y = start.placed.x + dx, start.placed.y + dy
                inside = low <= x <= high and low <= y <= high and max(abs(x - origin.x), abs(y - origin.y)) <= 2
                if inside and (x, y) not in tried:
                    tried.add((x, y))
                    near.append(Placed(origin.key, x, y))
            fit = max([start, *self._evaluate(fine, near)], key=lambda moved: moved.gain)  # the first of equals
            if fit is start:
                break
        return fit
