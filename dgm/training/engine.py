"""The engine: what one process, DDP and DeepSpeed ZeRO do differently, in six verbs.

prepare, forward (`learning`), backward and update, gather the full state, load it, agree on a flag.
The loop does not know which engine it runs on. `accelerate launch` chooses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, convert_to_fp32
from torch import Tensor, nn

from dgm.common.errors import UserError, disk_fault
from dgm.training.checkpoint import FullState
from dgm.training.device_settings import apply_device_settings
from dgm.training.launch_env import (
    MAX_THREADS,
    as_plain_processes,
    end_with_launcher,
    keep_freed_memory,
    on_gpu,
    read_launch,
    read_variables,
    use_threads,
)
from dgm.training.learner import Learner, See, Whole
from dgm.training.optimizer import Average, OptimConfig
from dgm.training.state_dicts import check_moments, check_weights, load_nets
from dgm.training.zero import Partitioned, Replicated, import_deepspeed

Result = TypeVar("Result")


class Engine:
    """Train nets on one process, DDP or ZeRO, as `accelerate launch` set things up."""

    def __init__(
        self,
        mixed_precision: str = "auto",
        trackers: list[str] | None = None,
        folder: str = ".",
        timeout_minutes: float = 30,
        deterministic: bool = False,
        tf32: bool = False,
        threads: int | None = None,
    ):
        """Join the processes, which wait for each other for so long (0: for ever).

        `mixed_precision`: no, bf16, or auto (bf16 on a GPU that has it). `deterministic` and `tf32`
        hold for all of the process (`apply_device_settings`); `threads` until it is closed
        (`use_threads`).
        """
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(f"train.threads is {threads}: choose 1 to {MAX_THREADS}")
        read_variables()
        apply_device_settings(deterministic, tf32)  # before anything makes a CUDA context
        if mixed_precision == "auto":
            bf16 = on_gpu() and torch.cuda.is_bf16_supported(False)
            mixed_precision = "bf16" if bf16 else "no"
        self.precision = mixed_precision
        self.asked = read_launch(mixed_precision)
        if self.asked.zero is not None:
            import_deepspeed()  # or say now that it is missing
        _check_trackers(trackers or [])
        if not on_gpu():
            keep_freed_memory()
        end_with_launcher()
        with as_plain_processes():
            self.accelerator = Accelerator(
                mixed_precision=mixed_precision,
                cpu=not on_gpu(),
                log_with=trackers or None,
                project_dir=folder,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_patience(timeout_minutes))],
            )
        self._threads_before = torch.get_num_threads()
        use_threads(threads)  # not before: accelerate sets them too
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.learners: dict[str, Learner] = {}
        # Hosts agree over gloo: it never waits for the GPU, and tells at once of a process that
        # died. The first one may build shards for a while as the others wait.
        patience = max(timedelta(hours=2), _patience(timeout_minutes))
        several = self.world_size > 1
        self._hosts: Any = dist.new_group(backend="gloo", timeout=patience) if several else None

    @property
    def name(self) -> str:
        """Say which engine this is."""
        return str(self.asked)

    @property
    def host_knows_norms(self) -> bool:
        """Say whether a gradient's norm costs the host no waiting: on a CPU, or as ZeRO waited."""
        zero = self.asked.zero
        return self.device.type == "cpu" or (zero is not None and zero.stage > 0)

    def prepare(
        self,
        nets: Mapping[str, nn.Module],
        optim: Mapping[str, OptimConfig],
        kernels: bool = False,
    ) -> None:
        """Move nets to the device, make the optimizer of each, and wrap both.

        With `kernels` of our own, where some fit.
        """
        for name, net in nets.items():
            if self.precision != "no":  # losses are sums of what a net gives, too long for bf16
                net.register_forward_hook(lambda net, inputs, outputs: convert_to_fp32(outputs))
            self.learners[name] = self._learner(net.to(self.device), optim[name], kernels)
            asked = str(self.asked.zero or ("DDP" if self.asked.processes > 1 else "one process"))
            found = self.learners[name].built
            if (found, self.world_size) != (asked, self.asked.processes):
                raise UserError(
                    f"the launch asks for {self.name}, but there is {found} on {self.world_size}: "
                    "start the processes with accelerate launch or torchrun"
                )

    def _learner(self, net: nn.Module, optim: OptimConfig, kernels: bool) -> Learner:
        zero = self.asked.zero
        if zero is None:
            return Whole(net, optim, kernels)
        return Replicated(net, optim) if zero.stage == 0 else Partitioned(net, optim, zero)

    @contextlib.contextmanager
    def learning(self, net: str) -> Iterator[Mapping[str, nn.Module]]:
        """Give the nets to a phase; all but the one that learns are frozen."""
        nets = {name: learner.net for name, learner in self.learners.items()}
        others = [p for name, n in nets.items() if name != net for p in n.parameters()]
        wanted = [p.requires_grad for p in others]
        for p in others:
            p.requires_grad_(False)
        try:
            yield nets
        finally:
            for p, before in zip(others, wanted, strict=True):
                p.requires_grad_(before)

    def backward(self, net: str, loss: Callable[[], Tensor], last: bool) -> None:
        """Compute a loss and add its gradient; only the last of a step is averaged over ranks."""
        self.learners[net].backward(loss, last)

    def update(self, net: str, lr: float, see: See, average: Average | None = None) -> bool:
        """Clip a net's gradient, show its norm to `see`, update the weights, clear the gradient.

        Says whether the average took in the new weights on the way.
        """
        return self.learners[net].update(lr, see, average)

    @contextlib.contextmanager
    def whole(self, write: bool = False) -> Iterator[Mapping[str, nn.Module]]:
        """Give the nets with their whole weights, to read or to `write`; every process must ask."""
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(learner.whole(write))
                for name, learner in self.learners.items()
            }

    def copies(self) -> dict[str, nn.Module]:
        """Copy the nets with their whole weights, frozen; every process must ask."""
        return {name: learner.copy() for name, learner in self.learners.items()}

    def full_state(self) -> FullState:
        """Gather whole weights and moments by their parameters' names; every process must ask."""
        with self.whole() as nets:
            model = {
                # ZeRO takes whole weights apart again behind us.
                f"{name}.{key}": value.clone() if self.asked.zero else value
                for name, net in nets.items()
                for key, value in net.state_dict().items()
            }
        moments = {
            f"{name}.{key}": value
            for name, learner in self.learners.items()
            for key, value in learner.moments().items()
        }
        return FullState(model, moments)

    def load_full_state(self, full: FullState) -> None:
        """Put a gathered state back; raises UserError where tensors do not fit the nets."""
        with self.whole(write=True) as nets:
            check_weights(nets, full.model)
            check_moments(nets, full.optimizer)
            load_nets(nets, full.model)
        for name, learner in self.learners.items():
            own = f"{name}."
            moments = full.optimizer.items()
            learner.continue_from({k.removeprefix(own): v for k, v in moments if k.startswith(own)})

    def agree(self, flag: bool) -> bool:
        """Say whether any process raised the flag; every process must ask."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._hosts)
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
                mistake = str(caught) if isinstance(caught, ValueError) else "fault"
                outcome[1] = disk_fault(caught) or mistake
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._hosts)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise UserError(str(outcome[1]))
        return outcome[0]  # type: ignore[return-value]

    def first_said(self, text: str | None) -> str | None:
        """Give all processes what the first of them that has something to say says."""
        said = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(said, text, group=self._hosts)
        return next((words for words in said if words is not None), None)

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate each process's equal part along the first dimension, in order of rank."""
        return self.accelerator.gather(part.contiguous())

    def spread(self, count: int, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Do `work` on the rows 0 to count - 1 (int64, on the CPU), each process an equal part.

        It gives a tensor with a first dimension of as many; all processes get the whole of it, and
        all must ask.
        """
        each = -(-count // self.world_size)
        # The last processes may lack a few rows; they repeat the last one, so parts are equal.
        own = torch.arange(self.rank * each, (self.rank + 1) * each).clamp(max=count - 1)
        return self.gather(work(own).to(self.device))[:count]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Compute in the engine's precision, for nets that it did not wrap."""
        return self.accelerator.autocast()

    def finish_trackers(self) -> None:
        """Let the trackers write what they still hold."""
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            tracker.finish()

    def close(self) -> None:
        """Finish the trackers and leave the group of processes."""
        # DDP and the second group hold threads of gloo; if they outlive the group that is taken
        # down here, the interpreter's own end may abort a process whose work is done.
        self.learners.clear()
        self._hosts = None
        self.accelerator.free_memory()
        with contextlib.suppress(OSError):  # a disk that is full, as was told already
            self.finish_trackers()
        self.accelerator.end_training()
        torch.set_num_threads(self._threads_before)


def _patience(minutes: float) -> timedelta:
    # A little longer than the watchdog's, which says what a process was at.
    return timedelta(minutes=min(minutes + 1, 1e6) if minutes else 1e6)


def _check_trackers(names: list[str]) -> None:
    # Accelerate leaves out a tracker that is not installed, and says nothing.
    known = [str(tracker.value) for tracker in get_available_trackers()]
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"run.trackers names {', '.join(missing)}, which is unknown or not installed: "
            f"install it or choose of {', '.join(known) or 'none'}"
        )
