"""Measures of `launch/evaluate.py` that are taken on the test images: no image is made for them."""

from __future__ import annotations

import torch

from dgm.cli.eval_context import Figures, Subject
from dgm.diffusion.objective import DiffusionObjective
from dgm.evaluation import timesteps
from dgm.evaluation.active_latents import active_latents
from dgm.evaluation.likelihood import bits_per_dim
from dgm.evaluation.online_eval import has_likelihood
from dgm.evaluation.reconstruction import reconstruction_error
from dgm.rng import permutation
from dgm.vae.objective import VAEObjective


def bits(subject: Subject) -> Figures:
    """Measure bits per dimension of test images, with their terms."""
    options, index = subject.options, _tested(subject)
    objective = has_likelihood(subject.trained.objective, "--measure", "distances")
    told = {"num_test_images": len(index), "importance_samples": options.importance_samples}
    engine, nets, test = subject.engine, subject.nets, subject.test
    if isinstance(objective, DiffusionObjective):
        found = timesteps.bound_by_timestep(engine, objective, nets, test, index, options.seed)
        return {"num_test_images": len(index), **found}
    found = bits_per_dim(
        engine, objective, nets, test, index, options.seed,
        importance_samples=options.importance_samples,
    )  # fmt: skip
    return {**told, **found}


def bits_by_ode(subject: Subject) -> Figures:
    """Measure bits per dimension of test images by the probability-flow ODE."""
    options, index = subject.options, _tested(subject)
    found = timesteps.bits_by_ode(
        subject.engine, _diffusion(subject), subject.nets, subject.test, index,
        options.seed, options.ode_steps, options.ode_tolerance,
    )  # fmt: skip
    how = "uniform dequantisation, Heun with Richardson extrapolation, one Rademacher probe"
    return {"num_test_images": len(index), "how": how, **found}


def loss_by_timestep(subject: Subject) -> Figures:
    """Measure the loss of test images by quarter of the timesteps."""
    index = _tested(subject)
    found = timesteps.loss_by_timestep(
        subject.engine, _diffusion(subject), subject.nets, subject.test, index,
        subject.options.seed,
    )  # fmt: skip
    return {"num_test_images": len(index), **found}


def reconstruction(subject: Subject) -> Figures:
    """Measure what is left of test images that go through a VAE's latents."""
    index = _tested(subject)
    objective = subject.trained.objective
    assert isinstance(objective, VAEObjective), "choose_measures has asked"
    given = (
        subject.engine, objective, subject.nets, subject.test, index, subject.options.seed
    )  # fmt: skip
    found = {**reconstruction_error(*given), **active_latents(*given)}
    return {"num_test_images": len(index), **found}


def _diffusion(subject: Subject) -> DiffusionObjective:
    objective = subject.trained.objective
    assert isinstance(objective, DiffusionObjective), "choose_measures has asked"
    return objective


def _tested(subject: Subject) -> torch.Tensor:
    return permutation(subject.options.seed, 0, len(subject.test))[: subject.options.num_test]
