"""AdamW and the learning rate, which is a pure function of images seen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.nn.kernels import adamw, native


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate; the defaults are DDPM's for CIFAR-10."""

    lr: float = 2e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weights of linear layers and convolutions, and of nothing else:
    neither biases nor norms, embeddings or learned scales; 0 makes it Adam."""
    warmup_images: int = 640_000
    """Images over which the rate rises linearly from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """Rate after the warm-up: `cosine` falls to zero at train.total_images."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; 0 does not clip."""


@dataclass(frozen=True)
class EmaUpdate:
    """A moving average a of weights w: a += lerp_weight (w - a) after an update."""

    averages: list[Tensor]  # one for each parameter of the optimizer, in its order
    lerp_weight: float


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), in one pass over the weights.

    On a CPU it uses our own kernel, which can update a moving average too; otherwise it calls
    torch's fused kernel directly. The result is bit-identical to torch.optim.AdamW's, which takes a
    millisecond per step more, and seconds to import the compiler.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimConfig,
        kernels: bool = False,
        decayed: Iterable[nn.Parameter] | None = None,
    ):
        """Start without moments; those of a weight are created with its first gradient.

        `decayed` are the parameters that weight decay applies to; None is all of them.
        """
        _check(config)
        self.parameters, self.config = list(parameters), config
        self._decayed = {id(p) for p in (self.parameters if decayed is None else decayed)}
        self.native = (
            kernels
            and native.supports(*self.parameters)
            and all(map(adamw.is_dense, self.parameters))
        )
        self.moments: dict[Tensor, AdamMoments] = {}
        self._on_device: DeviceInputs | None = None

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None, ema: EmaUpdate | None = None) -> bool:
        """Update the weights that have a gradient; none if `skip` [] on the device is 1.

        Return whether the moving average was updated too. All weights have one dtype and device.
        """
        weights: list[Tensor] = [*with_gradient(self.parameters)]
        if not weights:
            return False
        for weight in weights:
            if weight not in self.moments:
                self.moments[weight] = AdamMoments(
                    0, torch.zeros_like(weight), torch.zeros_like(weight)
                )
        if self._on_device is not None:
            self._on_device.updated = [self.moments[weight] for weight in weights]
            self._fused(self._on_device.lr, weights, self._on_device.steps, skip)
            return False
        own = [self.moments[weight] for weight in weights]
        for moments in own:
            moments.step += 1
        if self.native and skip is None:
            return self._native_step(lr, weights, own, ema)
        # The kernel needs each weight's step number; most are equal.
        device = weights[0].device
        each = {n: torch.full((), float(n), device=device) for n in {m.step for m in own}}
        steps = {weight: each[m.step] for weight, m in zip(weights, own, strict=True)}
        self._fused(lr, weights, steps, skip)
        return False

    @contextlib.contextmanager
    def on_device(self, lr: Tensor, counts: Tensor) -> Iterator[DeviceInputs]:
        """Make `step` use `lr` [] in place of its argument, and `counts` as step numbers; fp32.

        counts: [num parameters]. A captured step needs both on the device. The caller increments
        the moments' `step` afterwards.
        """
        self._on_device = DeviceInputs(lr, dict(zip(self.parameters, counts.unbind(), strict=True)))
        try:
            yield self._on_device
        finally:
            self._on_device = None

    def counts(self) -> list[int]:
        """Return the step number of each parameter's next update; the first is 1."""
        known = map(self.moments.get, self.parameters)
        return [1 if moments is None else moments.step + 1 for moments in known]

    def _fused(
        self,
        lr: float | Tensor,
        weights: list[Tensor],
        steps: Mapping[Tensor, Tensor],
        skip: Tensor | None,
    ) -> None:
        for decay, part in _by_decay(weights, self._decayed, self.config.weight_decay):
            moments = [self.moments[weight] for weight in part]
            torch._fused_adamw_(
                part, adamw.with_strides_of(part, [w.grad for w in part if w.grad is not None]),
                [m.exp_avg for m in moments], [m.exp_avg_sq for m in moments], [],
                [steps[weight] for weight in part],
                lr=lr, beta1=self.config.betas[0], beta2=self.config.betas[1], eps=self.config.eps,
                weight_decay=decay, amsgrad=False, maximize=False, found_inf=skip,
            )  # fmt: skip

    def _native_step(
        self, lr: float, weights: list[Tensor], own: list[AdamMoments], ema: EmaUpdate | None
    ) -> bool:
        """Update all weights, and their average if its layout matches, in one pass."""
        if len(weights) != len(self.parameters) or (ema and not _same_layout(ema, weights)):
            ema = None
        adamw.adamw_(
            weights, [p.grad for p in weights if p.grad is not None],
            [m.exp_avg for m in own], [m.exp_avg_sq for m in own],
            None if ema is None else ema.averages, [m.step for m in own],
            adamw.AdamWConfig(
                lr, self.config.betas, self.config.eps, self.config.weight_decay,
                0.0 if ema is None else ema.lerp_weight,
            ),
            [id(weight) in self._decayed for weight in weights],
        )  # fmt: skip
        return ema is not None

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return the moments by name, as torch.optim does."""
        return {
            weight: {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg,
                "exp_avg_sq": moments.exp_avg_sq,
            }
            for weight, moments in self.moments.items()
        }

    def load_moments(self, weight: nn.Parameter, found: dict[str, Tensor]) -> None:
        """Set a weight's moments, named as in `state`."""
        self.moments[weight] = AdamMoments(
            int(found["step"]), found["exp_avg"], found["exp_avg_sq"]
        )


@dataclass
class AdamMoments:
    """A weight's update count and running means of its gradient and squared gradient."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class DeviceInputs:
    """What a captured update reads from the device, and the moments that it updated."""

    lr: Tensor
    steps: dict[Tensor, Tensor]
    updated: list[AdamMoments] = field(default_factory=list)


def _by_decay(
    weights: Sequence[Tensor], decayed: set[int], weight_decay: float
) -> list[tuple[float, list[Tensor]]]:
    """Return (weight decay, weights) of each group that is not empty; one group without decay."""
    if weight_decay == 0:
        return [(0.0, list(weights))]
    groups = (
        (weight_decay, [weight for weight in weights if id(weight) in decayed]),
        (0.0, [weight for weight in weights if id(weight) not in decayed]),
    )
    return [group for group in groups if group[1]]


def _same_layout(ema: EmaUpdate, weights: list[Tensor]) -> bool:
    """Return whether the averages have the memory layout of the weights."""
    return all(a.stride() == w.stride() for a, w in zip(ema.averages, weights, strict=True))


def with_gradient(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the weights that have a gradient."""
    return [p for p in parameters if p.grad is not None]


def decayed_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a net that weight decay applies to.

    These are the weights of linear layers and convolutions, also under a parametrization such as
    spectral norm, but not biases and norms (He et al. 2019, "Bag of tricks for image classification
    with convolutional neural networks", section 3.1), embeddings or learned scales.
    """
    found = []
    for module in net.modules():
        if not isinstance(module, nn.Linear | _ConvNd):
            continue
        if parametrize.is_parametrized(module, "weight"):
            found.append(module.parametrizations["weight"].original)  # type: ignore[index, union-attr]
        else:
            found.append(module.weight)
    return found


def torch_adamw(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    decayed: Iterable[nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """Return torch's own AdamW, which DeepSpeed needs.

    `decayed` are the parameters that weight decay applies to; None is all of them.
    """
    _check(config)
    own = list(parameters)
    chosen = {id(p) for p in (own if decayed is None else decayed)}
    return torch.optim.AdamW(
        [  # DeepSpeed rejects empty groups
            {"params": part, "weight_decay": decay}
            for decay, part in _by_decay(own, chosen, config.weight_decay)
        ],
        lr=config.lr,
        betas=(float(config.betas[0]), float(config.betas[1])),  # it rejects integers
        eps=config.eps,
        fused=True,
    )


def _check(config: OptimConfig) -> None:
    check_range(config, "optim.", "lr", above=0)
    check_range(config, "optim.", "eps", "weight_decay", "warmup_images", "clip_norm", min=0)
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"optim.betas is {list(config.betas)}: choose numbers from 0 to below 1")


def learning_rate(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """Return the learning rate of the step that ends at `images_seen`."""
    rate = config.lr
    if config.warmup_images > 0:
        rate *= min(1.0, images_seen / config.warmup_images)
    if config.decay == "cosine":
        start = min(config.warmup_images, total_images)
        done = (images_seen - start) / max(total_images - start, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return rate
