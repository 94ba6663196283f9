"""DeepSpeed ZeRO: optimizer (1), gradients (2) and weights (3) of a net sharded over processes.

`accelerate launch` chooses it and starts the processes; each net gets a DeepSpeed engine of its
own, since accelerate's plugin supports one net only.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.common.errors import UserError
from dgm.training.ddp import LossFunction, LossModule, NormCheck, WrappedNet, clip
from dgm.training.launch_env import ZeroConfig, on_gpu
from dgm.training.optimizer import (
    EmaUpdate,
    OptimConfig,
    decayed_weights,
    torch_adamw,
    with_gradient,
)
from dgm.training.state_dicts import MOMENTS, frozen_copy, load_moments

_BUCKET = 50_000_000  # numbers per collective; more than any net here has


def import_deepspeed() -> Any:
    """Import DeepSpeed without its log lines; raise UserError where it cannot be imported."""
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it would look for CUDA's compiler
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"accelerate launch requests DeepSpeed, which cannot be imported ({error}): "
            "pip install deepspeed, or choose distributed_type MULTI_GPU"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing DeepSpeed sets it
    # On a CPU it would spend a minute compiling this, which only inference needs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _InDeepSpeed(WrappedNet):
    """The part that all stages have in common: the DeepSpeed engine and its gradients."""

    engine: Any

    @property
    def strategy(self) -> str:
        """Return the stage that DeepSpeed built: read from its optimizer, not our configuration."""
        made = self.engine.optimizer
        if hasattr(made, "fp32_partitioned_groups_flat"):
            return str(ZeroConfig(3, bool(made.offload_optimizer), bool(made.offload_param)))
        if hasattr(made, "single_partition_of_fp32_groups"):
            return str(ZeroConfig(2 if made.partition_gradients else 1, bool(made.cpu_offload)))
        return str(ZeroConfig(0))

    def forward(self, loss: LossFunction, sync: bool) -> Tensor:
        """Return the loss []; `sync`: average the gradient over ranks."""
        self.engine.set_gradient_accumulation_boundary(sync)
        return self.engine(loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        self.engine.backward(loss)


class DeepSpeedReplicated(_InDeepSpeed):
    """A net with a replica on each process and gradients averaged by DeepSpeed: stage 0."""

    def __init__(self, net: nn.Module, config: OptimConfig):
        self.net = net  # not channels_last: DeepSpeed needs contiguous weights
        self.clip_norm = config.clip_norm
        self.optimizer = torch_adamw(net.parameters(), config, decayed_weights(net))
        # Without clipping, which `clip_and_step` does.
        self.engine = _initialize(net, self.optimizer, ZeroConfig(0), clip_norm=0.0)

    def clip_and_step(self, lr: float, check: NormCheck, ema: EmaUpdate | None = None) -> bool:
        """Clip the gradient, update the weights, clear the gradient."""
        skip = check(clip(with_gradient(self.net.parameters()), self.clip_norm))
        _set_lr(self.optimizer, lr)
        if skip is not None:
            self.optimizer.found_inf = skip  # a fused optimizer reads it
        self.engine.step()
        return False

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Load the optimizer's moments."""
        load_moments(self.net, self.optimizer.state.__setitem__, moments)


class DeepSpeedPartitioned(_InDeepSpeed):
    """A net whose optimizer, gradients or weights DeepSpeed shards: stages 1 to 3."""

    def __init__(self, net: nn.Module, config: OptimConfig, zero: ZeroConfig):
        self.net, self.zero = net, zero
        # The net's structure, for copies; DeepSpeed shards its weights and adds hooks to it.
        self.template = frozen_copy(net).to("meta")
        self.optimizer = torch_adamw(net.parameters(), config, decayed_weights(net))
        self.engine = _initialize(net, self.optimizer, zero, config.clip_norm)

    def clip_and_step(self, lr: float, check: NormCheck, ema: EmaUpdate | None = None) -> bool:
        """Clip the gradient, update the weights, clear the gradient.

        DeepSpeed itself skips the update where the gradient is not finite.
        """
        _set_lr(self.optimizer, lr)
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
        check(norm.to(self.engine.device))
        return False

    @contextlib.contextmanager
    def full_weights(self, write: bool = False) -> Iterator[nn.Module]:
        """Yield the net with unsharded weights; stage 3 shards them again afterwards."""
        if self.zero.stage < 3:
            yield self.net
            return
        gathered = import_deepspeed().zero.GatheredParameters
        with gathered(list(self.net.parameters()), modifier_rank=0 if write else None):
            yield self.net

    def copy(self) -> nn.Module:
        """Return a frozen copy of the net with unsharded weights."""
        copied = copy.deepcopy(self.template).to_empty(device=self.engine.device)
        with self.full_weights() as net, torch.no_grad():
            for target, source in zip(copied.parameters(), net.parameters(), strict=True):
                target.copy_(source)
            for buffer, other in zip(copied.buffers(), net.buffers(), strict=True):
                buffer.copy_(other)
        return copied

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's unsharded moments by `<moment>.<parameter>`."""
        state = self.optimizer.state.get(self._parts[0], {})
        if "step" not in state:
            return {}
        get = import_deepspeed().utils.safe_get_full_optimizer_state
        shapes = {key: value.shape for key, value in self.template.named_parameters()}
        found = {}
        for key, parameter in self.net.named_parameters():
            found[f"step.{key}"] = state["step"].clone()
            for kind in MOMENTS[1:]:
                found[f"{kind}.{key}"] = get(parameter, kind).view(shapes[key])
        return found

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Set the fp32 master weights from those just loaded, and load the moments."""
        steps = [value for key, value in moments.items() if key.startswith("step.")]
        if steps:
            self._create_moments(max(steps, key=float))
        with self.full_weights() as net:
            weights = {key: value.detach().clone() for key, value in net.named_parameters()}
        for key, parameter in self.net.named_parameters():
            self._set(parameter, weights[key], None)
            for kind in MOMENTS[1:] if steps else ():
                # Other engines have no moments of a parameter that never had a gradient.
                value = moments.get(f"{kind}.{key}", torch.zeros_like(weights[key]))
                self._set(parameter, value, kind)

    @property
    def _parts(self) -> list[Tensor]:
        """Return this process's shards of the fp32 weights, which the inner optimizer updates."""
        stage_3 = "fp32_partitioned_groups_flat"
        name = stage_3 if self.zero.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.engine.optimizer, name))

    def _create_moments(self, step: Tensor) -> None:
        # The optimizer has none before its first step, and DeepSpeed cannot create them.
        for part in self._parts:
            self.optimizer.state[part] = {
                "step": step.to(part.device, torch.float32, copy=True),
                **{kind: torch.zeros_like(part) for kind in MOMENTS[1:]},
            }
        if self.zero.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """Set an unsharded weight (`kind` None) or moment."""
        utils = import_deepspeed().utils
        value = value.to(self.engine.device, torch.float32).contiguous()
        set_weight, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if self.zero.stage == 3:
            # DeepSpeed cannot take an unsharded tensor of a size that the processes do not divide.
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            each = -(-value.numel() // world)
            own = value.flatten()[rank * each : (rank + 1) * each]
            value = functional.pad(own, (0, each - len(own)))
            set_weight = utils.safe_set_local_fp32_param
            set_moment = utils.safe_set_local_optimizer_state
        if kind is None:
            set_weight(parameter, value)
        else:
            set_moment(parameter, value, kind)


def _initialize(
    net: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroConfig, clip_norm: float
) -> Any:
    """Create a DeepSpeed engine on the existing process group."""
    deepspeed, dist = import_deepspeed(), torch.distributed
    if not dist.is_initialized():  # one process
        backend = "nccl" if on_gpu() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    parts: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": _BUCKET}
    if zero.stage in (1, 2):
        parts["allgather_bucket_size"] = _BUCKET
    if zero.stage == 3:
        parts["stage3_prefetch_bucket_size"] = _BUCKET
        parts["stage3_param_persistence_threshold"] = 0
    if zero.offload_optimizer:
        parts["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_weights:
        parts["offload_param"] = {"device": "cpu"}
    config = {
        # The trainer makes the batches; DeepSpeed requires a number.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": parts,
        # The same AdamW as in other engines, not DeepSpeed's own.
        "zero_force_ds_cpu_optimizer": False,
        # Neither `bf16`, which would make the weights bf16, nor `torch_autocast`, which would send
        # gradients as bf16: the loss is computed under the same autocast as elsewhere.
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(
        model=LossModule(net), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
