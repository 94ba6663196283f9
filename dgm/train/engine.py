"""The engine: what one process and DDP (through accelerate) do differently, in six verbs.

prepare, forward (`nets`), backward and step, gather the full state, load it, agree on a flag.
The loop does not know which engine it runs on.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from dgm.errors import UserError
from dgm.train.checkpoint import FullState
from dgm.train.optim import OptimConfig, make_optimizer

Result = TypeVar("Result")


class Engine:
    """Train nets on one process or on many (DDP), as `accelerate launch` set things up."""

    def __init__(
        self, mixed_precision: str = "auto", trackers: list[str] | None = None, folder: str = "."
    ):
        """Join the processes. `mixed_precision`: no, bf16, or auto (bf16 on a GPU that has it)."""
        _check_launch()
        _check_trackers(trackers or [])
        _use_all_cores()
        # The first process may build shards for a while as the others wait.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
        # Buffers (BatchNorm) follow each process's own batch; broadcasting would cost every step.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        if mixed_precision == "auto":
            bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
            mixed_precision = "bf16" if bf16 else "no"
        self.precision = mixed_precision
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.cuda.is_available(),
            log_with=trackers or None,
            project_dir=folder,
            kwargs_handlers=[patience, ddp],
        )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.bare: dict[str, nn.Module] = {}
        self.nets: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        # Flags go over gloo, so that agreeing never waits for the GPU.
        self._flags: Any = dist.new_group(backend="gloo") if self.world_size > 1 else None

    @property
    def name(self) -> str:
        """Say which engine this is."""
        return "one process" if self.world_size == 1 else f"DDP on {self.world_size} processes"

    def prepare(
        self,
        nets: Mapping[str, nn.Module],
        optim: Mapping[str, OptimConfig],
        compiled: bool = False,
    ) -> None:
        """Move nets to the device, make the optimizer of each, and wrap both."""
        for name, net in nets.items():
            net = in_channels_last(net.to(self.device))
            if compiled:
                net.compile()  # in place: a wrapper would rename every key of the state
            self.bare[name] = net
            optimizer = make_optimizer(net.parameters(), optim[name])
            self.nets[name], self.optimizers[name] = self.accelerator.prepare(net, optimizer)

    @contextlib.contextmanager
    def learning(self, net: str) -> Iterator[Mapping[str, nn.Module]]:
        """Give the nets to a phase: the one that learns wrapped, the others bare and frozen."""
        others = [p for name, n in self.bare.items() if name != net for p in n.parameters()]
        wanted = [p.requires_grad for p in others]
        for p in others:
            p.requires_grad_(False)
        try:
            yield {**self.bare, net: self.nets[net]}
        finally:
            for p, before in zip(others, wanted, strict=True):
                p.requires_grad_(before)

    def backward(self, net: str, loss: Callable[[], Tensor], last: bool) -> None:
        """Compute a loss and add its gradient; only the last of a step is averaged over ranks."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.nets[net]):
            self.accelerator.backward(loss())

    def clip(self, net: str, clip_norm: float) -> Tensor:
        """Clip the gradient to `clip_norm` (0: not at all); give its norm before, []."""
        limit = clip_norm if clip_norm > 0 else float("inf")
        return nn.utils.clip_grad_norm_(self.bare[net].parameters(), limit)

    def update(self, net: str, lr: float, skip: Tensor | None = None) -> None:
        """Update a net's weights at this learning rate and clear its gradient.

        Where `skip` [] is 1 the device leaves the weights as they are; the host need not know.
        """
        optimizer = self.optimizers[net]
        for group in optimizer.param_groups:
            group["lr"] = lr
        if skip is not None:
            # Accelerate wraps the optimizer; torch's fused ones read this attribute.
            inner: Any = getattr(optimizer, "optimizer", optimizer)
            inner.found_inf = skip
        optimizer.step()
        optimizer.zero_grad()

    def full_state(self) -> FullState:
        """Gather weights and optimizer moments as whole tensors under their parameters' names."""
        model, moments = {}, {}
        for net, module in self.bare.items():
            model.update({f"{net}.{key}": value for key, value in module.state_dict().items()})
            state = self.optimizers[net].state
            for key, parameter in module.named_parameters():
                for kind, value in state.get(parameter, {}).items():
                    moments[f"{net}.{kind}.{key}"] = value
        return FullState(model, moments)

    def load_full_state(self, full: FullState) -> None:
        """Put a gathered state back; raises UserError where tensors do not fit the nets."""
        load_nets(self.bare, full.model)
        for net, module in self.bare.items():
            optimizer = self.optimizers[net]
            for key, parameter in module.named_parameters():
                found = {
                    kind: full.optimizer[f"{net}.{kind}.{key}"]
                    for kind in ("step", "exp_avg", "exp_avg_sq")
                    if f"{net}.{kind}.{key}" in full.optimizer
                }
                if found:
                    optimizer.state[parameter] = _like_parameter(found, parameter)

    def agree(self, flag: bool) -> bool:
        """Say whether any process raised the flag; every process must ask."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._flags)
        return bool(raised.item())

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Let the first process work while the others wait; all get the result or its UserError."""
        outcome: list[object] = [None, None]
        error: BaseException | None = None
        if self.is_main:
            try:
                outcome[0] = work()
            except BaseException as caught:
                error = caught
                outcome[1] = str(caught) if isinstance(caught, ValueError) else "fault"
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise UserError(str(outcome[1]))
        return outcome[0]  # type: ignore[return-value]

    def first_said(self, text: str | None) -> str | None:
        """Give all processes what the first of them that has something to say says."""
        said: list[str | None] = [text]
        if self.world_size > 1:
            said = gather_object(said)
        return next((words for words in said if words is not None), None)

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate each process's equal part along the first dimension, in order of rank."""
        return self.accelerator.gather(part.contiguous())

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Compute in the engine's precision, for nets that it did not wrap."""
        return self.accelerator.autocast()

    def finish_trackers(self) -> None:
        """Let the trackers write what they still hold."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def close(self) -> None:
        """Finish the trackers and leave the group of processes."""
        # DDP and the second group hold threads of gloo; if they outlive the group that is taken
        # down here, the interpreter's own end may abort a process whose work is done.
        self.nets.clear()
        self._flags = None
        self.accelerator.free_memory()
        self.accelerator.end_training()


def _check_launch() -> None:
    # `accelerate launch --cpu --num_processes N` starts a single process, and says nothing.
    several = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True"
    if several and not any(name in os.environ for name in ("RANK", "PMI_RANK", "PMI_SIZE")):
        raise UserError(
            "accelerate launch started one process though --num_processes asks for more: "
            "write --multi_gpu instead of --cpu, which serves CPUs too"
        )


def _check_trackers(names: list[str]) -> None:
    # Accelerate leaves out a tracker that is not installed, and says nothing.
    known = [str(tracker.value) for tracker in get_available_trackers()]
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"run.trackers names {', '.join(missing)}, which is unknown or not installed: "
            f"install it or choose of {', '.join(known) or 'none'}"
        )


def _use_all_cores() -> None:
    # `accelerate launch` and torchrun set one thread where nothing is set.
    if torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def load_nets(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into nets; raises UserError naming the first that do not fit."""
    wanted = {f"{n}.{key}": value for n, m in nets.items() for key, value in m.state_dict().items()}
    unfit = sorted(wanted.keys() ^ tensors.keys())
    unfit += [
        key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape
    ]
    if unfit:
        shown = ", ".join(unfit[:3]) + (f" and {len(unfit) - 3} more" if len(unfit) > 3 else "")
        raise UserError(
            f"the checkpoint does not fit the model at {shown}: use the model.* of its config.yaml"
        )
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(tensors[key])


def in_channels_last(net: nn.Module) -> nn.Module:
    """Lay out a net's convolutions for [B, H, W, C] in memory; the numbers stay."""
    convolves = any(p.ndim == 4 for p in net.parameters())
    return net.to(memory_format=torch.channels_last) if convolves else net


def copies(nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copy nets, frozen, without what an engine added to them."""
    frozen = {name: copy.deepcopy(net).requires_grad_(False) for name, net in nets.items()}
    return {name: net.eval() for name, net in frozen.items()}


def _like_parameter(found: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Place moments beside their parameter, in its memory format."""
    with torch.no_grad():
        placed = {
            kind: torch.empty_like(parameter, requires_grad=False).copy_(value)
            for kind, value in found.items()
            if kind != "step"
        }
    # A fused optimizer counts steps on the parameter's device.
    return {"step": found["step"].to(parameter.device), **placed}
