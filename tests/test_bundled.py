"""The models in the box: both load, share what they should, and the student draws in fewer passes."""

from __future__ import annotations

import pytest
import torch

import unialignment
from unialignment.conditioning import Denoiser
from unialignment.model.folders import packaged_models

PROMPT = "a large flat car in the center, on a yellow background"

pytestmark = pytest.mark.skipif(
    not {"nano", "nano-fast"} <= set(packaged_models()), reason="no bundled weights in this checkout"
)


@pytest.fixture(scope="module")
def models() -> dict[str, unialignment.UniAlignmentPipeline]:
    return {name: unialignment.load(name, device="cpu") for name in ("nano", "nano-fast")}


def test_the_student_has_its_teachers_latents_and_tokens(models) -> None:
    teacher, student = models["nano"], models["nano-fast"]
    assert student.name == "nano-fast"
    theirs = student.autoencoder.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.autoencoder.state_dict().items())
    assert student.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    own = student.transformer.state_dict()
    assert any(not torch.equal(value, own[name]) for name, value in teacher.transformer.state_dict().items())


def test_the_student_draws_in_a_fifth_of_the_passes(models, monkeypatch: pytest.MonkeyPatch) -> None:
    original, passes = Denoiser.velocity, 0

    def counted(self, *arguments):
        nonlocal passes
        made = original(self, *arguments)
        passes += len(made)
        return made

    monkeypatch.setattr(Denoiser, "velocity", counted)
    for name, expected in (("nano", 40), ("nano-fast", 8)):
        passes = 0
        picture = models[name].generate(PROMPT, seed=1).images[0]
        assert passes == expected
        assert "car" in models["nano"].caption(picture).texts[0]
        assert "yellow" in models[name].caption(picture).texts[0]
