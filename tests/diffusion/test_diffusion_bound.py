"""The variational bound of the diffusion objective."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_diffusion import SAMPLE, SMALL, RecordingNet, batch, objective, part_of, unet


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_bound_has_finite_terms_for_each_image(learned_variance: bool):
    config = replace(SMALL, learned_variance=learned_variance, num_timesteps=20)
    made, net = objective(config, replace(SAMPLE, steps=1)), unet(config)
    whole, draws = batch(4)
    terms = made.nats({"net": net}, whole, draws)
    assert set(terms) == {"decoder", "steps", "prior"}
    for name, value in terms.items():
        assert value.shape == (4,) and value.isfinite().all() and (value > 0).all(), name
    for i in range(4):
        alone = made.nats({"net": net}, *part_of(whole, i, i + 1))
        for name, value in alone.items():
            torch.testing.assert_close(value[0], terms[name][i], rtol=1e-9, atol=0)  # rounding


def test_the_bound_draws_noise_anew_at_each_timestep():
    made, net = objective(replace(SMALL, class_conditional=False)), RecordingNet()
    whole, draws = batch(16)
    made.nats({"net": net}, whole, draws)
    x_0 = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    alphas, sigmas = made.schedule.alphas, made.schedule.sigmas
    eps = [((x_t - alphas[i] * x_0) / sigmas[i]).flatten() for i, (x_t, *_) in enumerate(net.calls)]
    assert [int(t[0]) for _, t, _ in net.calls] == list(range(50))
    correlations = torch.corrcoef(torch.stack(eps)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / math.sqrt(16 * 192)  # 1,225 pairs: once in 1,400
    assert torch.stack(eps).std() == pytest.approx(1, abs=0.01)  # five standard errors
