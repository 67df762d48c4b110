"""The published procedure for texts, beside which ours is measured: its passes, its seeds, its distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from unialignment.benchmarking import published_text
from unialignment.benchmarking.published_text import STEPS, write_published
from unialignment.errors import InputError

PICTURE = Image.new("RGB", (32, 32), (200, 30, 90))


@pytest.mark.parametrize("mode", ["prefix", "joint"])
def test_every_pass_computes_everything(make_tiny_pipeline: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_tiny_pipeline(seed=3, attention_mode=mode)
    shapes: list[tuple[int, ...]] = []
    forward = pipe.transformer.forward

    def watched(**given: Any) -> Any:
        output = forward(**given)
        assert output.image_features is not None, "the picture's tokens are computed to the end"
        shapes.append(tuple(output.text_logits.shape[:2]))
        return output

    monkeypatch.setattr(pipe.transformer, "forward", watched)
    found = write_published(pipe, [PICTURE] * 2, ["", "what is the dog"], 6, [0, 1], steps=4)
    assert shapes == [(1, 6)] * sum(found.passes), "one picture at a time, logits at all positions"
    assert all(2 <= count <= 5 for count in found.passes)
    assert len(found.texts) == 2


def test_a_text_is_its_seed(tiny_pipeline: Any) -> None:
    first = write_published(tiny_pipeline, [PICTURE] * 2, ["", ""], 5, [7, 8], steps=3)
    again = write_published(tiny_pipeline, [PICTURE], [""], 5, [8], steps=3)
    assert again.texts == first.texts[1:]
    assert again.passes == first.passes[1:]


def test_passes_and_words_follow_the_process(tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position is unmasked in each of S steps alike, so a step unmasks something with probability 1 − (1 − 1/S)^L.

    That asks for a pass in the next step; the first step and the end have one each.
    """
    probabilities = torch.zeros(tiny_pipeline.transformer.config.vocab_size)
    probabilities[3], probabilities[4] = 0.75, 0.25
    written: list[torch.Tensor] = []

    def predict(_pipe: Any, _condition: Any, ids: torch.Tensor) -> torch.Tensor:
        written.append(ids)
        return probabilities.expand(1, ids.shape[1], -1).clone()

    monkeypatch.setattr(published_text, "_predict", predict)
    count, length = 150, 8
    found = write_published(tiny_pipeline, [PICTURE] * count, [""] * count, length, range(count))
    expected = 1 + (STEPS - 1) * (1 - (1 - 1 / STEPS) ** length) + 1
    assert sum(found.passes) / count == pytest.approx(expected, abs=0.3)
    ends = [ids for ids in written if not bool((ids == tiny_pipeline.tokenizer.mask_token_id).any())]
    assert len(ends) >= count
    share = float((torch.cat(ends) == 3).float().mean())
    assert share == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    ("questions", "length", "steps", "message"),
    [(["", ""], 4, 2, "1 pictures, 2 questions"), ([""], 0, 2, "length"), ([""], 4, 0, "steps")],
)
def test_bad_input(tiny_pipeline: Any, questions: list[str], length: int, steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_published(tiny_pipeline, [PICTURE], questions, length, [0], steps)
