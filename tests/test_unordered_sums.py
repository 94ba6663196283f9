"""No family's training step uses sums whose order a GPU does not fix (atomic additions).

Such operators round differently in each run, and are slow or refused with `train.deterministic`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import small_diffusion
import small_flow
import small_gan
import small_vae
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgm.objective import Batch, Nets, Objective
from dgm.rng import Draws

UNORDERED = {
    "embedding_dense_backward", "index_put", "index_put_", "_unsafe_index_put", "index_add",
    "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "put_",
    "_index_put_impl_",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Record each operator that runs, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(objective: Objective, nets: nn.Module | Nets, given: tuple[Batch, Draws]) -> set[str]:
    """Return the operators of a loss of each phase and of its backward pass."""
    batch, draws = given
    if isinstance(nets, nn.Module):
        nets = {objective.phases[0].net: nets}
    with Operators() as found:
        for phase in objective.phases:
            for name, net in nets.items():
                net.requires_grad_(name == phase.net)
            objective.loss(nets, batch, phase, draws)["loss"].backward()
    assert {"convolution", "convolution_backward"} <= found.seen
    return found.seen


def diffusion() -> set[str]:
    made = small_diffusion.objective()
    return operators(made, small_diffusion.unet().double(), small_diffusion.batch(4))


def gan(architecture: str, **config: Any) -> set[str]:
    batch_norm = "r1" not in config  # R1 needs independent images
    made = small_gan.objective(class_conditional=True, sees_batch=batch_norm, **config)
    nets = small_gan.nets(architecture, small_gan.NUM_CLASSES, batch_norm=batch_norm)
    return operators(made, nets, small_gan.batch(4))


def vae() -> set[str]:
    return operators(small_vae.objective(), small_vae.net("both"), small_vae.batch(4))


def flow(name: str) -> set[str]:
    net = small_flow.flow(small_flow.BOTH[name])
    return operators(small_flow.objective(), net, small_flow.batch(4))


STEPS = {
    "diffusion": diffusion,
    "DCGAN": partial(gan, "dcgan", augment=["color", "cutout"]),
    "residual GAN": partial(gan, "residual", r1=1.0),
    "VAE": vae,
    "Glow": partial(flow, "glow"),
    "RealNVP": partial(flow, "realnvp"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_no_unordered_sum(name: str):
    assert not STEPS[name]() & UNORDERED


def test_translated_images_add_zeros_only():
    """Each pixel has one gradient; outside of the image only zeros are added."""
    found = gan("dcgan", augment=["translation"]) & UNORDERED
    assert found and found <= {"scatter_add", "scatter_add_"}


def test_an_embedding_of_torch_is_found():
    labels, weight = torch.tensor([0, 1, 1]), torch.ones(2, 3, requires_grad=True)
    with Operators() as found:
        torch.nn.functional.embedding(labels, weight).sum().backward()
    assert found.seen & UNORDERED == {"embedding_dense_backward"}
