"""Solvers against exact solutions, guidance against its formula, decoding against models with known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unialignment.diffusion import (
    Guidance,
    MaskedPath,
    SeededNoise,
    TextDecoding,
    decode,
    sigma_schedule,
    solve,
    solve_with_scheduler,
)
from unialignment.errors import InputError

MASK, END = 1, 0


# ------------------------------------------------------------------------------------------------------- solvers


def gaussian_velocity(scale: float):
    """Exact velocity of data N(0, scale²) under rectified flow: E[ε − x | x_σ]."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 * scale**2 + sigma**2
        return x * (sigma - (1 - sigma) * scale**2) / variance

    return velocity


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    """For Gaussian data the flow maps noise z to scale * z exactly."""
    noise, scale = torch.ones(1, 1, 1, 1, dtype=torch.float64), 0.3

    def error(steps: int) -> float:
        result = solve(gaussian_velocity(scale), noise, sigma_schedule(steps), solver)
        return abs(float(result) - scale)

    ratio = error(64) / error(128)
    assert ratio == pytest.approx(2**order, rel=0.15)
    assert error(128) < 0.01


def test_diffusers_scheduler_gives_the_euler_solution() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler()
    theirs = solve_with_scheduler(gaussian_velocity(0.3), noise, scheduler, 30)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    torch.testing.assert_close(theirs, solve(gaussian_velocity(0.3), noise, sigmas), atol=1e-4, rtol=0)


def test_schedule_ends_and_shift() -> None:
    assert sigma_schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigma_schedule(2, shift=3.0) == [1.0, 0.75, 0.0]
    with pytest.raises(InputError, match="at least 1"):
        sigma_schedule(0)


def test_callback_sees_every_step_and_may_replace() -> None:
    seen: list[tuple[int, float]] = []

    def callback(step: int, sigma: float, x: Tensor) -> Tensor | None:
        seen.append((step, sigma))
        return torch.zeros_like(x) if step == 1 else None

    result = solve(lambda x, _: torch.zeros_like(x), torch.ones(1, 1, 1, 1), sigma_schedule(2), callback=callback)
    assert seen == [(0, 0.5), (1, 0.0)]
    assert float(result) == 0


def test_unknown_solver() -> None:
    with pytest.raises(InputError, match="euler, heun, dpmpp"):
        solve(lambda x, _: x, torch.ones(1), [1.0, 0.0], "rk4")


def test_dpmpp_is_diffusers_where_both_are_second_order() -> None:
    """Their first and last steps differ (they extrapolate from σ = 1); between, the arithmetic is the same."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(8)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    velocity, noise = gaussian_velocity(0.3), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(solve(velocity, noise, sigmas, "dpmpp"), x, atol=1e-5, rtol=0)


def test_stochastic_is_diffusers_too_and_noises_anew() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    shape, velocity = (1, 2, 2), gaussian_velocity(0.3)
    fresh = SeededNoise([5, 6], shape)
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(6)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    found = solve(velocity, fresh(), sigmas, "stochastic", fresh=fresh)
    # Their one generator for all samples is ours where there is one sample.
    for row, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, *shape, generator=generator)
        for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
            x = scheduler.step(velocity(x, sigma), timestep, x, generator=generator, return_dict=False)[0]
        scheduler.set_timesteps(6)
        torch.testing.assert_close(found[row : row + 1], x, atol=1e-5, rtol=0)
    # A model that knows the truth arrives there, whatever the noise on its way.
    truth = torch.full((2, *shape), 0.7)
    exact = solve(lambda x, sigma: (x - truth) / sigma, fresh(), sigma_schedule(4), "stochastic", fresh=fresh)
    torch.testing.assert_close(exact, truth)
    with pytest.raises(InputError, match="fresh"):
        solve(velocity, truth, sigma_schedule(4), "stochastic")


def test_second_order_pays_at_few_steps() -> None:
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    error = {
        solver: abs(float(solve(gaussian_velocity(0.3), noise, sigma_schedule(8), solver)) - 0.3)
        for solver in ("euler", "dpmpp")
    }
    assert error["dpmpp"] < 0.6 * error["euler"]


# ------------------------------------------------------------------------------------------------------ guidance


def test_guidance_follows_instruct_pix2pix() -> None:
    full, no_text, nothing = torch.tensor(5.0), torch.tensor(3.0), torch.tensor(2.0)
    guidance = Guidance(text_scale=4.0, image_scale=1.5)
    assert guidance.branches(has_sources=True) == ("full", "no_text", "nothing")
    combined = guidance.combine({"full": full, "no_text": no_text, "nothing": nothing})
    assert float(combined) == 2 + 1.5 * (3 - 2) + 4 * (5 - 3)
    assert float(Guidance(4.0).combine({"full": full, "no_text": no_text})) == 3 + 4 * (5 - 3)


def test_equal_scales_need_two_passes_and_give_the_same() -> None:
    values = {"full": torch.tensor(5.0), "no_text": torch.tensor(3.0), "nothing": torch.tensor(2.0)}
    guidance = Guidance(2.0, 2.0)
    assert guidance.branches(has_sources=True) == ("full", "nothing")
    two = guidance.combine({"full": values["full"], "nothing": values["nothing"]})
    assert float(two) == float(guidance.combine(values))


def test_no_guidance_needs_one_pass() -> None:
    assert Guidance().branches(True) == ("full",)
    assert Guidance(3.0, 2.0).branches(has_sources=False) == ("full", "no_text")
    assert Guidance(3.0, interval=(0.2, 0.8)).branches(False, 0.9) == ("full",)
    assert Guidance(3.0, interval=(0.2, 0.8)).branches(False, 0.5) == ("full", "no_text")


def test_texts_are_guided_away_from_what_the_prompt_alone_would_say() -> None:
    full, no_image, nothing = (torch.tensor(value) for value in (5.0, 3.0, 1.0))
    guidance = Guidance(image_scale=2.0, reads=True)
    assert guidance.branches(True) == ("full", "no_image")
    assert guidance.branches(False) == ("full",)
    assert float(guidance.combine({"full": full, "no_image": no_image})) == 3 + 2 * (5 - 3)
    both = Guidance(text_scale=3.0, image_scale=2.0, reads=True)
    assert both.branches(True) == ("full", "no_image", "nothing")
    assert float(both.combine({"full": full, "no_image": no_image, "nothing": nothing})) == 1 + 3 * 2 + 2 * 2
    assert Guidance(text_scale=3.0, reads=True).branches(True) == ("full", "no_text")
    assert Guidance(text_scale=2.0, image_scale=2.0, reads=True).branches(True) == ("full", "nothing")


@pytest.mark.parametrize("make", [lambda: Guidance(-1), lambda: Guidance(1, 1, (0.9, 0.1))])
def test_bad_guidance(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------ decoding


def oracle(truth: Tensor, certainty: Tensor | None = None):
    """A model that knows the text ``truth [B, L]``, and counts its calls."""
    calls: list[int] = []

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        calls.append(int(positions.sum()))
        scores = torch.full((*truth.shape, 12), -20.0)
        strength = torch.full(truth.shape, 5.0) if certainty is None else certainty
        scores.scatter_(-1, truth.unsqueeze(-1), strength.unsqueeze(-1))
        return scores[positions]

    return logits, calls


TRUTH = torch.tensor([[5, 6, 7, 8, 9, 10, END, END], [3, 4, END, END, END, END, END, END]])


@pytest.mark.parametrize("method", ["confidence", "ancestral"])
@pytest.mark.parametrize("steps", [1, 3, 8, 30])
def test_a_perfect_model_writes_the_truth(method: str, steps: int) -> None:
    logits, _ = oracle(TRUTH)
    settings = TextDecoding(method, steps)
    result = decode(logits, torch.full_like(TRUTH, MASK), MaskedPath(MASK), settings, [0, 1], end_id=END)
    assert torch.equal(result, TRUTH)


def test_given_words_stay_even_when_the_model_disagrees() -> None:
    logits, _ = oracle(TRUTH)
    start = torch.full_like(TRUTH, MASK)
    start[0, 2] = 11
    result = decode(logits, start, MaskedPath(MASK), TextDecoding(steps=4), [0, 1])
    assert int(result[0, 2]) == 11
    assert torch.equal(result[1], TRUTH[1])


def test_surest_positions_come_first() -> None:
    certainty = torch.arange(8.0).flip(0).expand(2, 8) - 15
    logits, _ = oracle(TRUTH, certainty)
    order: list[list[int]] = []
    decode(
        logits,
        torch.full_like(TRUTH, MASK),
        MaskedPath(MASK),
        TextDecoding(steps=8),
        [0, 1],
        callback=lambda _s, ids: order.append((ids[0] != MASK).nonzero().flatten().tolist()),
    )
    assert order[:3] == [[0], [0, 1], [0, 1, 2]]


def test_decoding_stops_early_and_closes_after_the_end() -> None:
    certainty = torch.where(TRUTH == END, 5.0, -10.0)
    logits, calls = oracle(TRUTH[1:], certainty[1:])
    decode(logits, torch.full_like(TRUTH[1:], MASK), MaskedPath(MASK), TextDecoding(steps=8), [0], end_id=END)
    # One end token closes the six of the text; the two words take a step each.
    assert len(calls) <= 4


def test_sure_words_are_written_at_once() -> None:
    """Four words above the threshold, four below, which take a step each."""
    certainty = torch.tensor([[5.0, -18.0, 5.0, -18.5, 5.0, -19.0, 5.0, -19.5]])
    truth = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 3]])
    start = torch.full((1, 8), MASK)
    counts = {}
    for threshold in (1.0, 0.9):
        logits, calls = oracle(truth, certainty)
        settings = TextDecoding(steps=8, threshold=threshold)
        assert torch.equal(decode(logits, start, MaskedPath(MASK), settings, [0]), truth)
        counts[threshold] = calls
    assert counts[1.0] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert counts[0.9] == [8, 4, 3, 2, 1]


SURE, UNSURE = 5.0, -18.5
"""Strengths of :func:`oracle`: probabilities of nearly one, and of one third."""


def parallel(truth: Tensor, certainty: Tensor, end_id: int | None = END, steps: int = 8) -> list[int]:
    """Open positions at each call, with a threshold; the text must be the truth."""
    logits, calls = oracle(truth, certainty)
    settings = TextDecoding(steps=steps, threshold=0.9)
    seeds = list(range(len(truth)))
    assert torch.equal(decode(logits, torch.full_like(truth, MASK), MaskedPath(MASK), settings, seeds, end_id), truth)
    return calls


def test_an_answer_of_one_unsure_word_takes_one_pass() -> None:
    truth = torch.tensor([[7, END, END, END, END, END]])
    certainty = torch.tensor([[UNSURE, SURE, SURE, SURE, SURE, SURE]])
    assert parallel(truth, certainty) == [6]


def test_what_follows_a_sure_end_needs_no_certainty() -> None:
    truth = torch.tensor([[7, END, END, END, END, END]])
    certainty = torch.tensor([[UNSURE, SURE, UNSURE, UNSURE, UNSURE, UNSURE]])
    assert parallel(truth, certainty) == [6]
    # Without an end token, as for gaps, nothing closes them.
    assert len(parallel(truth, certainty, end_id=None)) > 1


def test_two_unsure_words_do_not_go_together() -> None:
    truth = torch.tensor([[7, 8, END, END], [5, 6, 9, END]])
    certainty = torch.tensor([[UNSURE, UNSURE - 0.5, SURE, SURE], [SURE, SURE, SURE, SURE]])
    assert parallel(truth, certainty) == [8, 2, 1]
    # Nor when the quota of a step takes one of them anyway: what comes with it isn't sure.
    assert parallel(truth[:1, :3], certainty[:1, :3], steps=2) == [3, 1]


@pytest.mark.parametrize(("steps", "threshold"), [(8, 0.9), (2, 1.0)])
@pytest.mark.parametrize("first", [True, False])
def test_a_word_likely_at_two_neighbouring_places_is_said_once(steps: int, threshold: float, first: bool) -> None:
    """A model that wants word 5 at place 0 or 1 of two, and 6 at the other, and knows of the other what is written."""

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        scores = torch.zeros(1, 2, 12)
        for place in (0, 1):
            other = int(ids[0, 1 - place])
            surer = first == (place == 0)
            scores[0, place, 6 if other == 5 else 5] = 6.0 + surer
        return scores[positions]

    settings = TextDecoding(steps=steps, threshold=threshold)
    found = decode(logits, torch.full((1, 2), MASK), MaskedPath(MASK), settings, [0])
    assert found.tolist() == [[5, 6] if first else [6, 5]]
    # In one pass everything has to be filled.
    one = TextDecoding(steps=1, threshold=threshold)
    assert decode(logits, torch.full((1, 2), MASK), MaskedPath(MASK), one, [0]).tolist() == [[5, 5]]


def test_neighbours_that_both_end_or_were_given_do_not_wait() -> None:
    assert parallel(torch.tensor([[7, END, END, END]]), torch.full((1, 4), SURE)) == [4]
    logits, calls = oracle(torch.tensor([[7, 7, 8, 9]]))
    start = torch.tensor([[7, MASK, MASK, MASK]])
    assert decode(logits, start, MaskedPath(MASK), TextDecoding(steps=8, threshold=0.9), [0]).tolist() == [[7, 7, 8, 9]]
    assert calls == [3]


def test_ancestral_calls_the_model_only_when_something_is_unmasked() -> None:
    logits, calls = oracle(TRUTH[:1, :3])
    decode(logits, torch.full((1, 3), MASK), MaskedPath(MASK), TextDecoding("ancestral", 100), [4])
    assert len(calls) <= 3


@pytest.mark.parametrize("method", ["confidence", "ancestral"])
def test_a_sampled_text_is_its_seeds_alone(method: str) -> None:
    settings = TextDecoding(method, 4, temperature=1.0, top_p=0.9)

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(6, 12, generator=generator)
        return table.expand(ids.shape[0], 6, 12)[positions]

    start = torch.full((3, 6), MASK)
    together = decode(logits, start, MaskedPath(MASK), settings, [10, 11, 12])
    for row, seed in enumerate([10, 11, 12]):
        alone = decode(logits, start[:1], MaskedPath(MASK), settings, [seed])
        assert torch.equal(together[row : row + 1], alone)
    assert not bool((together == MASK).any())
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_sampling_follows_the_probabilities_and_top_p() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return probabilities.log().clamp_min(-50).expand(int(positions.sum()), 5)

    start = torch.full((1, 20_000), MASK)
    drawn = decode(logits, start, MaskedPath(MASK), TextDecoding(steps=1, temperature=1.0), [0])
    shares = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)
    nucleus = decode(logits, start, MaskedPath(MASK), TextDecoding(steps=1, temperature=1.0, top_p=0.7), [0])
    assert set(nucleus.unique().tolist()) == {0, 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TextDecoding("beam"),
        lambda: TextDecoding(steps=0),
        lambda: TextDecoding(temperature=-1),
        lambda: TextDecoding(top_p=0),
        lambda: TextDecoding(threshold=0),
    ],
)
def test_bad_decoding_settings(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]
