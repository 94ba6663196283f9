"""The engine: accelerate (one process or DDP) or DeepSpeed ZeRO, whichever the launcher requests.

The trainer does not depend on which engine it runs on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, convert_to_fp32
from torch import Tensor, nn

from dgm.common.errors import UserError, disk_fault
from dgm.training.ddp import DataParallelNet, WrappedNet
from dgm.training.launch_env import on_gpu, read_launch, read_variables, without_deepspeed_plugin
from dgm.training.optimizer import OptimConfig
from dgm.training.state_dicts import check_moments, check_weights, load_nets
from dgm.training.zero import DeepSpeedPartitioned, DeepSpeedReplicated, import_deepspeed

Result = TypeVar("Result")


class Engine:
    """The processes and the device of a run, and its nets wrapped for them.

    A collective method has to be called on all processes.
    """

    def __init__(self, mixed_precision: str = "auto", timeout_minutes: float = 30):
        """Join the process group; `timeout_minutes` limits collectives (0: no limit).

        mixed_precision: no, bf16, or auto (bf16 on a GPU that supports it).
        """
        read_variables()
        if mixed_precision == "auto":
            bf16 = on_gpu() and torch.cuda.is_bf16_supported(False)
            mixed_precision = "bf16" if bf16 else "no"
        self.precision = mixed_precision
        self.launch = read_launch(mixed_precision)
        if self.launch.zero is not None:
            import_deepspeed()  # reports at once if it is missing
        with without_deepspeed_plugin():
            self.accelerator = Accelerator(
                mixed_precision=mixed_precision,
                cpu=not on_gpu(),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_timeout(timeout_minutes))],
            )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.wrapped_nets: dict[str, WrappedNet] = {}
        # A second group, over gloo: it never waits for the GPU and reports at once a process that
        # died. The first process may build shards for a while as the others wait.
        timeout = max(timedelta(hours=2), _timeout(timeout_minutes))
        self._gloo_group: Any = None
        if self.world_size > 1:
            self._gloo_group = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def norms_on_host(self) -> bool:
        """Return whether a gradient's norm is read without a wait for the GPU: CPU, ZeRO-1 to 3."""
        zero = self.launch.zero
        return self.device.type == "cpu" or (zero is not None and zero.stage > 0)

    def prepare(
        self,
        nets: Mapping[str, nn.Module],
        optim: Mapping[str, OptimConfig],
        kernels: bool = False,
    ) -> None:
        """Move nets to the device and wrap each with its optimizer.

        `kernels`: use our own where supported.
        """
        for name, net in nets.items():
            if self.precision != "no":  # losses are long sums over outputs: inaccurate in bf16
                net.register_forward_hook(lambda net, inputs, outputs: convert_to_fp32(outputs))
            wrapped = self._wrap(net.to(self.device), optim[name], kernels)
            self.wrapped_nets[name] = wrapped
            is_ddp = self.launch.processes > 1
            expected = str(self.launch.zero or ("DDP" if is_ddp else "one process"))
            if (wrapped.strategy, self.world_size) != (expected, self.launch.processes):
                raise UserError(
                    f"the launcher requests {self.launch}, but there is {wrapped.strategy} on "
                    f"{self.world_size}: start the processes with accelerate launch or torchrun"
                )

    def _wrap(self, net: nn.Module, optim: OptimConfig, kernels: bool) -> WrappedNet:
        zero = self.launch.zero
        if zero is None:
            return DataParallelNet(net, optim, kernels)
        if zero.stage == 0:
            return DeepSpeedReplicated(net, optim)
        return DeepSpeedPartitioned(net, optim, zero)

    @contextlib.contextmanager
    def freeze_others(self, net: str) -> Iterator[Mapping[str, nn.Module]]:
        """Yield the nets, all but `net` frozen."""
        nets = {name: wrapped.net for name, wrapped in self.wrapped_nets.items()}
        others = [p for name, n in nets.items() if name != net for p in n.parameters()]
        before = [p.requires_grad for p in others]
        for p in others:
            p.requires_grad_(False)
        try:
            yield nets
        finally:
            for p, requires_grad in zip(others, before, strict=True):
                p.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def full_weights(self, write: bool = False) -> Iterator[Mapping[str, nn.Module]]:
        """Yield the nets with unsharded weights, to read or to `write`. Collective."""
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(wrapped.full_weights(write))
                for name, wrapped in self.wrapped_nets.items()
            }

    def copy_nets(self) -> dict[str, nn.Module]:
        """Return frozen copies of the nets with unsharded weights. Collective."""
        return {name: wrapped.copy() for name, wrapped in self.wrapped_nets.items()}

    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return unsharded weights and moments, named as in a checkpoint. Collective."""
        with self.full_weights() as nets:
            model = {
                # ZeRO shards these tensors again on exit.
                f"{name}.{key}": value.clone() if self.launch.zero else value
                for name, net in nets.items()
                for key, value in net.state_dict().items()
            }
        moments = {
            f"{name}.{key}": value
            for name, wrapped in self.wrapped_nets.items()
            for key, value in wrapped.moments().items()
        }
        return model, moments

    def load_full_state(self, model: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Load unsharded weights and moments; raise UserError where they do not fit the nets."""
        with self.full_weights(write=True) as nets:
            check_weights(nets, model)
            check_moments(nets, moments)
            load_nets(nets, model)
        for name, wrapped in self.wrapped_nets.items():
            prefix = f"{name}."
            wrapped.load_moments(
                {k.removeprefix(prefix): v for k, v in moments.items() if k.startswith(prefix)}
            )

    def any_rank(self, flag: bool) -> bool:
        """Return whether any process has the flag set. Collective."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._gloo_group)
        return bool(flags.item())

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the first process; return its result, or raise its UserError, on all.

        Collective.
        """
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
            dist.broadcast_object_list(outcome, src=0, group=self._gloo_group)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise UserError(str(outcome[1]))
        return outcome[0]  # type: ignore[return-value]

    def first_value(self, text: str | None) -> str | None:
        """Return the text of the first process that has one. Collective."""
        texts = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, text, group=self._gloo_group)
        return next((each for each in texts if each is not None), None)

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate the processes' parts, of equal size, in order of rank. Collective."""
        return self.accelerator.gather(part.contiguous())

    def map_rows(self, count: int, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `work` to rows 0 to count - 1, split over the processes, and gather the results.

        `work` gets row numbers (int64 [n], on the CPU) and returns [n, ...]; all processes get
        [count, ...]. Collective.
        """
        per_rank = -(-count // self.world_size)
        # The last processes repeat the last row where rows are missing, so that parts are equal.
        rows = torch.arange(self.rank * per_rank, (self.rank + 1) * per_rank).clamp(max=count - 1)
        return self.gather(work(rows).to(self.device))[:count]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that computes in the engine's precision."""
        return self.accelerator.autocast()

    def finish_trackers(self) -> None:
        """Flush and close the trackers."""
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            tracker.finish()

    def close(self) -> None:
        """Finish the trackers and leave the process group."""
        # DDP and the second group have gloo threads; if these outlive the group that is destroyed
        # here, the interpreter may abort at exit, after all work is done.
        self.wrapped_nets.clear()
        self._gloo_group = None
        self.accelerator.free_memory()
        with contextlib.suppress(OSError):  # a full disk, which was reported already
            self.finish_trackers()
        self.accelerator.end_training()


def _timeout(minutes: float) -> timedelta:
    # A little longer than the watchdog's, whose message names the activity.
    return timedelta(minutes=min(minutes + 1, 1e6) if minutes else 1e6)
