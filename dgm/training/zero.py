"""DeepSpeed ZeRO: optimizer (1), gradients (2) and weights (3) of a net spread over processes.

`accelerate launch` says that it is wanted, and starts the processes; the nets go to DeepSpeed
directly, an engine of its own for each, since accelerate's plugin serves one net only.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.training.launch_env import Zero, on_gpu
from dgm.training.learner import See, Step, clip
from dgm.training.optimizer import Average, OptimConfig, decayed_weights, learnt, torchs_adamw
from dgm.training.state_dicts import MOMENTS, frozen_copy, load_moments, moments_of

_BUCKET = 50_000_000  # numbers sent at once; more than any net here has


def import_deepspeed() -> Any:
    """Import DeepSpeed without its chatter; raises UserError where it cannot be."""
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for CUDA's compiler
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"accelerate launch asks for DeepSpeed, which cannot be imported ({error}): "
            "pip install deepspeed, or choose distributed_type MULTI_GPU"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets it
    # On a CPU it would compile a minute long what only inference needs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _InDeepSpeed:
    """What all stages have in common: the engine that DeepSpeed made, and its gradients."""

    engine: Any

    @property
    def built(self) -> str:
        """Say what stands."""
        return str(_built(self.engine))

    def backward(self, loss: Callable[[], Tensor], last: bool) -> None:
        """Compute a loss and add its gradient; only the last of a step is averaged over ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(self.engine(loss))


class Replicated(_InDeepSpeed):
    """A net of which each process holds all, its gradients averaged by DeepSpeed: stage 0."""

    def __init__(self, net: nn.Module, config: OptimConfig):
        """Make the optimizer and hand both to DeepSpeed."""
        self.net = net  # its weights stay contiguous, as DeepSpeed wants them
        self.clip_norm = config.clip_norm
        self.optimizer = torchs_adamw(net.parameters(), config, decayed_weights(net))
        self.engine = _initialize(net, self.optimizer, Zero(0), clip_norm=0.0)  # `update` clips

    def update(self, lr: float, see: See, average: Average | None = None) -> bool:
        """Clip the gradient, update the weights at this learning rate, and clear it."""
        skip = see(clip(learnt(self.net.parameters()), self.clip_norm))
        set_lr(self.optimizer, lr)
        if skip is not None:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # a fused one reads it
        self.engine.step()
        return False

    def whole(self, write: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the net."""
        return contextlib.nullcontext(self.net)

    def copy(self) -> nn.Module:
        """Copy the net, frozen."""
        return frozen_copy(self.net)

    def moments(self) -> dict[str, Tensor]:
        """Give the optimizer's moments by `moment.parameter`."""
        return moments_of(self.net, self.optimizer.state)

    def continue_from(self, moments: Mapping[str, Tensor]) -> None:
        """Put moments back."""
        load_moments(self.net, self.optimizer.state.__setitem__, moments)


class Partitioned(_InDeepSpeed):
    """A net of which DeepSpeed spreads something over the processes: stages 1 to 3."""

    def __init__(self, net: nn.Module, config: OptimConfig, zero: Zero):
        """Make the optimizer and hand both to DeepSpeed; raises UserError where it cannot."""
        self.net, self.zero = net, zero
        # The net's form; DeepSpeed takes the net's own weights apart and hangs hooks into it.
        self.form = frozen_copy(net).to("meta")
        self.optimizer = torchs_adamw(net.parameters(), config, decayed_weights(net))
        check_shards(self.optimizer)
        self.engine = _initialize(net, self.optimizer, zero, config.clip_norm)

    def update(self, lr: float, see: See, average: Average | None = None) -> bool:
        """Update the weights at this learning rate, clipped, and clear the gradient.

        DeepSpeed itself leaves the weights alone where the gradient is not finite.
        """
        set_lr(self.optimizer, lr)
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
        see(norm.to(self.engine.device))
        return False

    def whole(self, write: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the net with its whole weights; in stage 3 they are let go of afterwards."""
        return self._gathered(write) if self.zero.stage == 3 else contextlib.nullcontext(self.net)

    @contextlib.contextmanager
    def _gathered(self, write: bool) -> Iterator[nn.Module]:
        gathered = import_deepspeed().zero.GatheredParameters
        with gathered(list(self.net.parameters()), modifier_rank=0 if write else None):
            yield self.net

    def copy(self) -> nn.Module:
        """Copy the net with its whole weights, frozen."""
        made = copy.deepcopy(self.form).to_empty(device=self.engine.device)
        with self.whole() as net, torch.no_grad():
            for mine, theirs in zip(made.parameters(), net.parameters(), strict=True):
                mine.copy_(theirs)
            for own, other in zip(made.buffers(), net.buffers(), strict=True):
                own.copy_(other)
        return made

    def moments(self) -> dict[str, Tensor]:
        """Gather the optimizer's moments by `moment.parameter`."""
        state = self.optimizer.state.get(self._parts[0], {})
        if "step" not in state:
            return {}
        get = import_deepspeed().utils.safe_get_full_optimizer_state
        found = {}
        for key, parameter in self.net.named_parameters():
            found[f"step.{key}"] = state["step"].clone()
            for kind in MOMENTS[1:]:
                found[f"{kind}.{key}"] = get(parameter, kind).view(self._shapes[key])
        return found

    def continue_from(self, moments: Mapping[str, Tensor]) -> None:
        """Take the weights just written for the fp32 ones, and put moments back."""
        steps = [value for key, value in moments.items() if key.startswith("step.")]
        if steps:
            self._make_moments(max(steps, key=float))
        with self.whole() as net:
            weights = {key: value.detach().clone() for key, value in net.named_parameters()}
        for key, parameter in self.net.named_parameters():
            self._set(parameter, weights[key], None)
            for kind in MOMENTS[1:] if steps else ():
                # Elsewhere a parameter that never had a gradient has no moments.
                value = moments.get(f"{kind}.{key}", torch.zeros_like(weights[key]))
                self._set(parameter, value, kind)

    @property
    def _shapes(self) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in self.form.named_parameters()}

    @property
    def _parts(self) -> list[Tensor]:
        """Give this process's parts of the fp32 weights, as the inner optimizer knows them."""
        spread = "fp32_partitioned_groups_flat"
        name = spread if self.zero.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.engine.optimizer, name))

    def _make_moments(self, step: Tensor) -> None:
        # The optimizer has none before its first step, and DeepSpeed no way to make them.
        for part in self._parts:
            self.optimizer.state[part] = {
                "step": step.to(part.device, torch.float32, copy=True),
                **{kind: torch.zeros_like(part) for kind in MOMENTS[1:]},
            }
        if self.zero.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """Put back a whole weight (`kind` None) or moment."""
        utils = import_deepspeed().utils
        value = value.to(self.engine.device, torch.float32).contiguous()
        if self.zero.stage < 3:
            if kind is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        # Of a tensor that does not divide among the processes, DeepSpeed can only be given parts.
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        each = -(-value.numel() // world)
        part = torch.zeros(each, device=value.device)
        own = value.flatten()[rank * each : (rank + 1) * each]
        part[: len(own)] = own
        if kind is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)


def check_shards(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where ZeRO cannot shard an optimizer."""
    import_deepspeed()
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        name = type(optimizer).__name__
        raise UserError(f"ZeRO cannot shard the optimizer {name}: use AdamW, one process, or DDP")


def _initialize(
    net: nn.Module, optimizer: torch.optim.Optimizer, zero: Zero, clip_norm: float
) -> Any:
    """Let DeepSpeed make its engine, on the group of processes that there is."""
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
        # The loop makes the batches; DeepSpeed insists on a number.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": parts,
        # The same AdamW as everywhere, not one of DeepSpeed's own.
        "zero_force_ds_cpu_optimizer": False,
        # Neither `bf16`, which would make the weights bf16, nor `torch_autocast`, which would send
        # gradients as bf16: the loss is computed under the same autocast as everywhere.
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(
        model=Step(net), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _built(engine: Any) -> Zero:
    """Tell the stage from what DeepSpeed made, not from what it was told."""
    made = engine.optimizer
    if hasattr(made, "fp32_partitioned_groups_flat"):
        return Zero(3, bool(made.offload_optimizer), bool(made.offload_param))
    if hasattr(made, "single_partition_of_fp32_groups"):
        return Zero(2 if made.partition_gradients else 1, bool(made.cpu_offload))
    return Zero(0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
