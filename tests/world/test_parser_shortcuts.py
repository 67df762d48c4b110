"""The parser's shortcuts (what is remembered, left out or done at once) change nothing of what it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from unialignment.world import parser as parser_module
from unialignment.world._matching import CORRELATION, ENERGY, MISSING, Array, ScanBank, apply_separable, blur_matrix
from unialignment.world._search import OVERHANG, Fit, Placed, Search, merit
from unialignment.world.layout import sample_scene
from unialignment.world.parser import SceneParser

SCAN = ScanBank.scan


class PlainSearch(Search):
    """The search without shortcuts: nothing is remembered, one placement is evaluated after the other."""

    def error(self, placed: Sequence[Placed]) -> float:
        return float(((self._picture - self._compose(placed)) ** 2).sum())

    def _compose(self, placed: Sequence[Placed]) -> Array:
        return self._synthesis.compose(self._background, placed)

    def _best_fits(self, behind: Sequence[Placed], front: Sequence[Placed], count: int) -> list[Fit]:
        return self._find_fits(behind, front, count)

    def _evaluate(self, fine: Array, placements: Sequence[Placed]) -> list[Fit]:
        fits = []
        for item in placements:
            weights, unit = self._synthesis.templates.weights(item.key), self._synthesis.geometry.unit
            rows, columns = (
                slice((start + OVERHANG) * unit, (start + OVERHANG) * unit + len(weights)) for start in (item.y, item.x)
            )
            totals = (fine[rows, columns] * weights).astype(np.float64).sum((0, 1)).astype(np.float32)
            correlation, energy, missing = (totals[part].sum() for part in (CORRELATION, ENERGY, MISSING))
            value = merit(correlation, energy, missing)
            fits.append(Fit(item, float(2 * correlation - energy), float(energy), float(value)))
        return fits


def plain_scan(bank: ScanBank, features: Array, where: np.ndarray) -> tuple[Array, ...]:
    """Everything at every place; then what was asked for."""
    return tuple(values[:, where] for values in SCAN(bank, features, np.arange(bank.starts.size**2)))


def blurred(image: np.ndarray, rng: np.random.Generator, sigma: float = 1.5) -> np.ndarray:
    return np.rint(apply_separable(image.astype(np.float32), blur_matrix(len(image), sigma))).astype(np.uint8)


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, 20, image.shape)), 0, 255).astype(np.uint8)


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, image.shape, dtype=np.uint8)


def blobs(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft spots of random colours, much like what a model draws that has learned little: the slowest to explain."""
    across = np.arange(len(image))
    drawn = np.broadcast_to(rng.uniform(0, 255, 3), image.shape)
    for x, y, sigma in zip(rng.uniform(10, 54, 3), rng.uniform(10, 54, 3), rng.uniform(4, 9, 3)):
        cover = np.exp(-((across[:, None] - y) ** 2 + (across[None] - x) ** 2) / (2 * sigma**2))[..., None]
        drawn = (1 - cover) * drawn + cover * rng.uniform(0, 255, 3)
    return drawn.astype(np.uint8)


@pytest.mark.parametrize("spoil", [lambda image, rng: image, blurred, noisy, noise, blobs])
def test_shortcuts_change_nothing(
    pack, nano, renderer, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., np.ndarray]
) -> None:
    rng = np.random.default_rng(8)
    pictures = [spoil(renderer.render(sample_scene(rng, nano, "train", count=3)), rng) for _ in range(2)]
    parser = SceneParser(pack, nano)
    found = [parser.parse(picture) for picture in pictures]
    monkeypatch.setattr(parser_module, "Search", PlainSearch)
    monkeypatch.setattr(ScanBank, "scan", plain_scan)
    for picture, fast in zip(pictures, found):
        slow = parser.parse(picture)
        assert (fast.scene, fast.explanation) == (slow.scene, slow.explanation)
        assert fast.explanation_scores == pytest.approx(slow.explanation_scores, abs=1e-5)
        assert (fast.residual, fast.background_score) == pytest.approx((slow.residual, slow.background_score), abs=1e-6)
