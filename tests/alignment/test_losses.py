"""Alignment losses: published values, masks, and that a gathered batch is one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from unialignment.alignment.losses import contrastive_loss, intrinsic_loss, mean_pool, retrieval_accuracy
from unialignment.alignment.projectors import AlignmentProjector
from unialignment.errors import InputError


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> dict[str, Tensor]:
    path = shared_dir / "parity" / "official-tiny" / "losses.safetensors"
    if not path.exists():
        pytest.skip(f"no published values: {path} does not exist")
    return load_file(str(path))


def test_intrinsic_matches_published(published: dict[str, Tensor]) -> None:
    loss = intrinsic_loss(published["intrinsic.predicted"], published["intrinsic.teacher"])
    torch.testing.assert_close(loss, published["intrinsic.loss"][0], atol=1e-5, rtol=0)


def test_contrastive_matches_published(published: dict[str, Tensor]) -> None:
    loss = contrastive_loss(
        published["contrastive.image_tokens"],
        published["contrastive.text_tokens"],
        temperature=float(published["contrastive.temperature"]),
    )
    torch.testing.assert_close(loss, published["contrastive.loss"][0], atol=1e-5, rtol=0)


def test_intrinsic_known_values() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert intrinsic_loss(x, 3 * x).item() == pytest.approx(0)
    assert intrinsic_loss(x, -x).item() == pytest.approx(2)
    assert intrinsic_loss(x, x.flip(1)).item() == pytest.approx(1)
    assert intrinsic_loss(x, torch.stack([x[0], -x[1]]), torch.tensor([True, False])).item() == pytest.approx(0)
    assert intrinsic_loss(x, -x, torch.tensor([False, False])).item() == 0


def test_intrinsic_per_token() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, teacher = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    each = 1 - F.cosine_similarity(tokens, teacher, dim=-1)
    torch.testing.assert_close(intrinsic_loss(tokens, teacher), each.mean())
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    torch.testing.assert_close(intrinsic_loss(tokens, teacher, mask), each[mask].mean())
    shared = torch.randn(2, 8, generator=generator)
    torch.testing.assert_close(
        intrinsic_loss(tokens, shared), (1 - F.cosine_similarity(tokens, shared[:, None], dim=-1)).mean()
    )


def test_teacher_gets_no_gradient() -> None:
    predicted, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    intrinsic_loss(predicted, teacher).backward()
    assert predicted.grad is not None and teacher.grad is None


def test_padding_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(4, 6, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)
    padded = torch.cat([text, 100 * torch.randn(4, 2, 8, generator=generator)], dim=1)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 4)
    torch.testing.assert_close(contrastive_loss(image, padded, text_mask=mask), contrastive_loss(image, text))
    torch.testing.assert_close(contrastive_loss(padded, image, image_mask=mask), contrastive_loss(text, image))


def test_mean_pool_of_nothing_is_zero() -> None:
    pooled = mean_pool(torch.ones(2, 3, 4), torch.tensor([[True, True, False], [False] * 3]))
    assert pooled.tolist() == [[1.0] * 4, [0.0] * 4]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 3), st.integers(0, 10_000))
def test_gathered_processes_equal_one_batch(per_process: int, processes: int, seed: int) -> None:
    """Loss and gradients averaged over processes equal those of a single process with the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    total = per_process * processes
    image = torch.randn(total, 4, 8, generator=generator, requires_grad=True)
    text = torch.randn(total, 3, 8, generator=generator, requires_grad=True)
    whole = contrastive_loss(image, text)
    expected = torch.autograd.grad(whole, (image, text))

    everything = {id_: F.normalize(t.mean(1), dim=-1) for id_, t in (("image", image), ("text", text))}
    losses = []
    for process in range(processes):
        rows = slice(process * per_process, (process + 1) * per_process)
        sides = iter(("image", "text"))

        def gather(features: Tensor, start: int = rows.start, sides: object = sides) -> tuple[Tensor, int]:
            full = everything[next(sides)]  # type: ignore[call-overload]
            torch.testing.assert_close(full[start : start + len(features)], features)
            return full, start

        losses.append(contrastive_loss(image[rows], text[rows], gather=gather))
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, whole)
    for got, want in zip(torch.autograd.grad(mean, (image, text)), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_contrastive_prefers_right_pairs() -> None:
    features = torch.eye(4)
    assert contrastive_loss(features, features).item() < 1e-4
    assert contrastive_loss(features, features.roll(1, 0)).item() > 10
    assert retrieval_accuracy(features, features) == (1.0, 1.0)
    assert retrieval_accuracy(features, features.roll(1, 0)) == (0.0, 0.0)


def test_single_pair_teaches_nothing_but_has_gradient() -> None:
    image = torch.randn(1, 2, 4, requires_grad=True)
    loss = contrastive_loss(image, torch.randn(1, 3, 4))
    loss.backward()
    assert loss.item() == 0 and image.grad is not None and not image.grad.any()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InputError, match="output_dim"):
        intrinsic_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="mask must be"):
        intrinsic_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="pairs"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 3))


@pytest.mark.parametrize("published_form", [True, False])
def test_projector_forms(published_form: bool) -> None:
    torch.manual_seed(0)
    projector = AlignmentProjector(8, 5, hidden_dim=16, published=published_form)
    tokens, mask = torch.randn(64, 4, 8) * 10, torch.tensor([[True, True, False, False]] * 64)
    output = projector(tokens, mask)
    assert output.shape == (64, 5)
    torch.testing.assert_close(output, projector(tokens[:, :2]))
    # SiLU never goes below -0.2785: the published head can't point in most directions.
    assert bool((output < -0.3).any()) is not published_form


def test_projector_per_token() -> None:
    projector = AlignmentProjector(8, 5, hidden_dim=16, pool=False)
    tokens = torch.randn(2, 3, 8)
    assert projector(tokens).shape == (2, 3, 5)
    torch.testing.assert_close(projector(tokens)[:, 1], projector(tokens[:, 1]))
