"""The leak's readings on models whose answer is known, and on a real one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unialignment.errors import InputError
from unialignment.training.ablation.leak import measure_leak, recall

P = 12
CODES = F.one_hot(torch.arange(P), P).float()
CAPTIONS = [f"text {index}" for index in range(P)]


class Known:
    """Pictures are one-hot latents; ``leaks`` says whether the picture's stream of a pass carries the text instead."""

    dtype = torch.float32

    def __init__(self, leaks: bool) -> None:
        self.leaks = leaks
        self.transformer = SimpleNamespace(embed=lambda features, stream, mask=None: F.normalize(features, dim=-1))
        self.transformer = _Callable(self)

    def encode_images(self, pictures):
        return torch.stack([4 * CODES[np.asarray(picture)[0, 0, 0]] for picture in pictures])[:, None, None]

    def embed_text(self, texts):
        return torch.stack([CODES[int(text.split()[1])] for text in texts])

    def embed_latents(self, latents):
        # a model that leaks has never learned to see
        flat = latents.flatten(1)
        return F.normalize(torch.ones_like(flat) if self.leaks else flat, dim=-1)

    def condition(self, texts):
        return SimpleNamespace(text=self.embed_text(texts), mask=None)


class _Callable:
    def __init__(self, pipe: Known) -> None:
        self.pipe = pipe

    def __call__(self, *, text_embeds, text_mask, latents, timestep, target):
        assert target == "image"
        seen = text_embeds if self.pipe.leaks else latents.flatten(1)
        return SimpleNamespace(image_features=seen, text_features=text_embeds)

    def embed(self, features, stream, mask=None):
        return F.normalize(features, dim=-1)


@pytest.fixture()
def pictures():
    return [np.full((8, 8, 3), index, np.uint8) for index in range(P)]


def test_a_model_that_copies_the_text_is_found_out(pictures) -> None:
    found = measure_leak(Known(leaks=True), pictures, CAPTIONS, "published", batch_size=5)
    assert set(found.as_trained.values()) == {1.0} and found.blind == 1.0
    assert set(found.swapped_pass.values()) == {1.0} and set(found.swapped_own.values()) == {0.0}
    assert found.separate <= 0.5  # one constant for all pictures


def test_a_model_that_looks_is_cleared(pictures) -> None:
    found = measure_leak(Known(leaks=False), pictures, CAPTIONS, "published", batch_size=5)
    assert found.as_trained["0.25"] == 1.0 and found.separate == 1.0
    assert found.blind < 0.5
    assert found.swapped_own["0.25"] > 0.9 > 0.1 > found.swapped_pass["0.25"]


def test_the_condition_form_cannot_see_the_pair(make_tiny_pipeline) -> None:
    pipe = make_tiny_pipeline()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(5)]
    captions = ["the dog", "the cat", "a red apple", "a blue dog", "what is the cat"]
    found = measure_leak(pipe, pictures, captions, "condition", batch_size=2)
    assert found.as_trained == {"clean": found.separate}
    assert found == measure_leak(pipe, pictures, captions, "condition", batch_size=5)
    assert found.to_json()["pool"] == 5


@pytest.mark.parametrize("mode", ["joint", "prefix"])
def test_the_published_form_runs_on_real_models(make_tiny_pipeline, mode: str) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(4)]
    pipe = make_tiny_pipeline(attention_mode=mode)
    found = measure_leak(pipe, pictures, ["the dog", "the cat", "a red apple", "a blue dog"], "published")
    assert list(found.as_trained) == ["0.25", "0.5", "0.75", "0.95"]


def test_a_collapse_retrieves_nothing() -> None:
    assert recall(torch.ones(4, 3), torch.ones(4, 3)) == 0.0
    assert recall(torch.eye(4), torch.eye(4)) == 1.0


def test_mistakes_are_named(tiny_pipeline, pictures) -> None:
    with pytest.raises(InputError, match="published"):
        measure_leak(tiny_pipeline, pictures, CAPTIONS, "joint")
    with pytest.raises(InputError, match="two pairs"):
        measure_leak(tiny_pipeline, pictures[:1], CAPTIONS[:1], "condition")
