"""Schedules: their published formulas, their inverse, and the timesteps that samplers visit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgm.diffusion.schedule import SCHEDULES, Schedule, cosine, linear, make_schedule

NAMES = tuple(SCHEDULES)
timesteps = st.integers(2, 1500)


def test_linear_has_the_betas_of_ddpm():
    betas = linear(1000).betas
    assert betas.dtype == torch.float64
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    # Back from a product of up to 1000 factors, each rounded to 1.1e-16, relative to alpha's 1.
    torch.testing.assert_close(betas, expected, rtol=0, atol=1e-15)
    # Ho et al. 2020, section 4: the prior's divergence is about 1e-5 bits per dimension.
    assert float(linear(1000).alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)


def test_linear_keeps_its_last_level_when_timesteps_change():
    # beta times T is what counts, up to terms of order 1 / T.
    few, many = (float(linear(t).alphas_cumprod[-1]) for t in (500, 4000))
    assert math.log(few) == pytest.approx(math.log(many), rel=0.03)


def test_linear_betas_stay_below_one_with_few_timesteps():
    assert linear(2).betas.tolist() == pytest.approx([0.05, 0.999], rel=1e-12)


def test_cosine_is_its_formula():
    schedule = cosine(1000)

    def signal(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 499, 998):
        expected = signal(t + 1) / signal(0)
        # A product of up to 999 factors, each rounded to 1.1e-16.
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(expected, rel=1e-12)
    # The formula's last beta is 1 and is clamped to 0.999.
    assert float(schedule.betas[-1]) == pytest.approx(0.999, rel=1e-12)


@given(st.sampled_from(NAMES), timesteps)
@settings(max_examples=40, deadline=None)
def test_betas_and_alphas_cumprod_are_consistent(name: str, num_timesteps: int):
    schedule = make_schedule(name, num_timesteps)
    assert schedule.num_timesteps == num_timesteps
    assert schedule.betas.min() > 0 and schedule.betas.max() <= 0.999 + 1e-12
    back = torch.cumprod(1 - schedule.betas, 0)
    torch.testing.assert_close(back, schedule.alphas_cumprod, rtol=1e-11, atol=0)


@given(st.sampled_from(NAMES), timesteps, st.booleans())
@settings(max_examples=40, deadline=None)
def test_snr_falls_with_the_timestep(name: str, num_timesteps: int, zero_terminal_snr: bool):
    schedule = make_schedule(name, num_timesteps, zero_terminal_snr)
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert (schedule.snr.diff() < 0).all()
    assert schedule.alphas_cumprod.max() < 1 and schedule.alphas_cumprod.min() >= 0
    ones = torch.ones_like(schedule.alphas)
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, ones, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        schedule.snr, (schedule.alphas / schedule.sigmas) ** 2, rtol=1e-12, atol=0
    )


@given(st.sampled_from(NAMES), timesteps)
@settings(max_examples=40, deadline=None)
def test_zero_terminal_snr_keeps_the_first_level_and_sets_the_last_to_zero(
    name: str, num_timesteps: int
):
    plain, moved = (make_schedule(name, num_timesteps, zero) for zero in (False, True))
    assert float(moved.alphas_cumprod[-1]) == 0
    assert float(moved.snr[-1]) == 0
    assert float(moved.alphas_cumprod[0]) == pytest.approx(
        float(plain.alphas_cumprod[0]), rel=1e-14
    )
    # Lin et al. 2024, algorithm 1: alpha is shifted, then scaled, so ratios of gaps do not change.
    gaps = [(s.alphas - s.alphas[-1]) / (s.alphas[0] - s.alphas[-1]) for s in (plain, moved)]
    torch.testing.assert_close(*gaps, rtol=0, atol=1e-14)


@given(timesteps, st.data())
@settings(max_examples=200, deadline=None)
def test_timesteps_fall_evenly_from_the_last(num_timesteps: int, data: st.DataObject):
    steps = data.draw(st.integers(1, num_timesteps))
    levels = Schedule(torch.linspace(0.9, 0.1, num_timesteps)).timesteps(steps)
    assert len(levels) == steps
    assert levels[0] == num_timesteps - 1 and levels[-1] >= 0
    gaps = [level - next_level for level, next_level in zip(levels, [*levels[1:], -1], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1  # as even as integers can be
