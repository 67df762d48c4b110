"""Both diffusion processes against closed forms, finite differences and the published losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from unialignment.diffusion import FlowPath, MaskedPath, SeededNoise, shift_sigma
from unialignment.errors import ConfigError

MASK = 9


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> dict[str, torch.Tensor]:
    path = shared_dir / "parity" / "official-tiny" / "losses.safetensors"
    if not path.is_file():
        pytest.skip("the parity tensors are not at hand")
    return load_file(path)


# ---------------------------------------------------------------------------------------------------- continuous


def test_flow_loss_is_the_published_one(published: dict[str, torch.Tensor]) -> None:
    path = FlowPath(loss_space="sample").sample_path(
        published["flow.clean"], published["flow.sigma"], noise=published["flow.noise"]
    )
    torch.testing.assert_close(path.noised, published["flow.noisy"], atol=1e-5, rtol=0)
    loss = FlowPath(loss_space="sample").loss(published["flow.predicted_velocity"], path)
    torch.testing.assert_close(loss, published["flow.loss_per_sample"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.mean(), published["flow.loss"].squeeze(), atol=1e-5, rtol=0)


def test_velocity_is_the_derivative_of_the_path() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 3, 3, generator=generator, dtype=torch.float64)
    flow, h = FlowPath(), 1e-4
    time = torch.tensor([0.1, 0.5, 0.7, 0.95], dtype=torch.float64)
    ahead = flow.sample_path(clean, time + h, noise=noise).noised
    behind = flow.sample_path(clean, time - h, noise=noise).noised
    path = flow.sample_path(clean, time, noise=noise)
    derivative = (ahead - behind) / (2 * h)
    assert float(flow.loss(derivative, path).max()) < 1e-12
    assert float(flow.loss(derivative + 1, path).min()) == pytest.approx(1.0, abs=1e-5)


def test_path_ends_are_data_and_noise() -> None:
    clean, noise = torch.randn(2, 2, 1, 4, 4)
    path = FlowPath().sample_path(clean, torch.tensor([0.0, 1.0]), noise=noise)
    torch.testing.assert_close(path.noised[0], clean[0])
    torch.testing.assert_close(path.noised[1], noise[1])
    assert path.timestep.tolist() == [0, 1000]


def test_times_follow_the_logit_normal_and_the_shift() -> None:
    flow = FlowPath(logit_mean=0.5, logit_std=1.3)
    logits = torch.logit(flow.sample_time(200_000, torch.Generator().manual_seed(0)).double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logits.std()) == pytest.approx(1.3, abs=0.02)
    # The shift adds log(s) in logit space (SD 3, equation 23).
    shifted = FlowPath(0.5, 1.3, shift=3.0).sample_time(200_000, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(torch.logit(shifted), logits + torch.log(torch.tensor(3.0)).double(), atol=1e-2, rtol=0)


def test_a_batch_of_times_covers_every_quantile() -> None:
    time = FlowPath().sample_time(64, torch.Generator().manual_seed(0)).double()
    quantiles = torch.special.ndtr(torch.logit(time)).sort().values
    assert bool((quantiles >= torch.arange(64) / 64 - 1e-4).all())
    assert bool((quantiles <= torch.arange(1, 65) / 64 + 1e-4).all())
    assert not torch.equal(time, time.sort().values)


@given(st.floats(0.05, 0.99), st.floats(0.0, 1.0))
def test_sample_space_is_the_velocity_error_times_its_weight(sigma: float, floor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, prediction = torch.randn(2, 3, 2, 4, 4, generator=generator)
    time = torch.full((3,), sigma)
    path = FlowPath().sample_path(clean, time, generator=generator)
    velocity = FlowPath().loss(prediction, path)
    weighted = FlowPath(loss_space="sample", weight_floor=floor).loss(prediction, path)
    expected = sigma**2 / (max(sigma, floor) ** 2 if floor else 1.0)
    torch.testing.assert_close(weighted, expected * velocity, rtol=1e-4, atol=1e-6)


def test_noise_of_a_sample_is_its_seeds_alone() -> None:
    many, one = SeededNoise([5, 6, 7], (2, 3)), SeededNoise([6], (2, 3))
    first, second = many(), many()
    torch.testing.assert_close(first[1], one()[0], atol=0, rtol=0)
    torch.testing.assert_close(second[1], one()[0], atol=0, rtol=0)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


def test_shift_one_changes_nothing_and_keeps_the_ends() -> None:
    sigma = torch.linspace(0, 1, 11)
    assert shift_sigma(sigma, 1.0) is sigma
    assert shift_sigma(sigma, 3.0)[[0, -1]].tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------------ discrete


def test_masked_loss_is_the_published_one(published: dict[str, torch.Tensor]) -> None:
    masked = MaskedPath(int(published["text.mask_id"]))
    torch.testing.assert_close(masked.total_noise(published["text.time"]), published["text.sigma"])
    torch.testing.assert_close(masked.rate(published["text.time"]), published["text.dsigma"])
    clean, noised = published["text.clean_ids"], published["text.masked_ids"]
    path = masked.sample_path(clean, published["text.time"])
    path = type(path)(clean, noised, path.time, path.timestep, corrupted=noised == masked.mask_id)
    loss = masked.loss(published["text.logits"], path)
    torch.testing.assert_close(loss.mean(), published["text.loss"].squeeze(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(loss, published["text.loss_per_token"].mean(1), atol=1e-5, rtol=1e-5)
    only_masked = masked.loss(published["text.logits"][path.corrupted], path)
    torch.testing.assert_close(only_masked, loss, atol=1e-6, rtol=1e-6)


def test_rate_is_the_derivative_of_the_total_noise() -> None:
    masked, h = MaskedPath(MASK), 1e-6
    time = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    slope = (masked.total_noise(time + h) - masked.total_noise(time - h)) / (2 * h)
    torch.testing.assert_close(slope, masked.rate(time), rtol=1e-6, atol=0)


def test_share_of_masked_tokens_is_the_schedules() -> None:
    masked = MaskedPath(MASK)
    clean = torch.zeros(4, 50_000, dtype=torch.long)
    time = torch.tensor([0.1, 0.4, 0.8, 1.0])
    path = masked.sample_path(clean, time, torch.Generator().manual_seed(0))
    assert path.corrupted is not None
    torch.testing.assert_close(path.corrupted.float().mean(1), (1 - masked.epsilon) * time, atol=0.01, rtol=0)
    assert torch.equal(path.noised == MASK, path.corrupted)


def test_given_words_are_never_masked() -> None:
    maskable = torch.zeros(2, 100, dtype=torch.bool)
    maskable[:, 50:] = True
    path = MaskedPath(MASK).sample_path(torch.ones(2, 100, dtype=torch.long), torch.ones(2), maskable=maskable)
    assert not bool((path.noised[:, :50] == MASK).any())
    assert bool((path.noised[:, 50:] == MASK).float().mean() > 0.9)


def test_the_mask_is_never_predicted_and_logits_are_left_alone() -> None:
    logits = torch.randn(3, 10)
    before = logits.clone()
    probabilities = MaskedPath(MASK).subs(logits).softmax(-1)
    assert bool((probabilities[:, MASK] == 0).all())
    assert torch.equal(logits, before)


def test_elbo_of_the_uniform_model_is_its_log_likelihood() -> None:
    """Averaged over t, the weighted loss of p = 1/(V-1) is log(V-1) per token: the bound is tight for it."""
    masked, vocabulary = MaskedPath(MASK), 10
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        clean = torch.randint(0, 9, (256, 32), generator=generator)
        path = masked.sample_path(clean, masked.sample_time(256, generator), generator)
        losses.append(masked.loss(torch.zeros(256, 32, vocabulary), path).mean())
    expected = torch.log(torch.tensor(vocabulary - 1.0))
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("weighting", ["uniform", "elbo"])
def test_positions_behind_the_end_count_as_much_as_they_are_told_to(weighting: str) -> None:
    clean = torch.tensor([[5, 6, 0, 0, 0, 0]])  # 0 ends the text, and fills the canvas
    logits = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0))

    def loss(padding: float, canvas: int = 6) -> torch.Tensor:
        masked = MaskedPath(MASK, weighting=weighting, padding=padding, padding_id=0)
        path = masked.sample_path(clean[:, :canvas], torch.tensor([0.5]))
        path = type(path)(path.clean, path.noised, path.time, path.timestep, corrupted=torch.ones(1, canvas).bool())
        return masked.loss(logits[:, :canvas], path)

    torch.testing.assert_close(loss(0.0), loss(1.0, canvas=3))  # the end itself always counts
    assert (loss(0.3) - (3 * loss(0.0) + 0.3 * (6 * loss(1.0) - 3 * loss(0.0))) / 3.9).abs() < 1e-5
    with pytest.raises(ConfigError, match="masked.padding"):
        MaskedPath(MASK, padding=0.5)


def test_times_are_antithetic() -> None:
    time = MaskedPath(MASK).sample_time(64, torch.Generator().manual_seed(3)).sort().values
    assert float((time.diff() - 0.999 / 64).abs().max()) < 0.02
    assert float(time.min()) > 0


def test_a_batch_without_masks_costs_nothing_and_has_a_gradient() -> None:
    path = MaskedPath(MASK).sample_path(torch.ones(2, 4, dtype=torch.long), torch.zeros(2))
    logits = torch.zeros(0, 10, requires_grad=True)
    loss = MaskedPath(MASK).loss(logits, path)
    assert loss.tolist() == [0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowPath(loss_space="pixels"),
        lambda: FlowPath(shift=0),
        lambda: MaskedPath(MASK, weighting="none"),
        lambda: MaskedPath(MASK, epsilon=0),
    ],
)
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]
