"""A capturer of steps for the CPU that is as strict as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgm.training.trainer import Trainer

Result = TypeVar("Result")
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotCapturableError(RuntimeError):
    """An operator that a CUDA graph cannot hold, or that would draw from a generator's state."""


class Tape(TorchDispatchMode):
    """Records every operator with its tensors; `replay` runs them again on the same memory.

    No recorded Python code runs again, so what it read from the host stays as it was. The outputs
    of operators are filled with NaN (integers with -1) between replays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.own: dict[int, Tensor] = {}  # outputs, by the address of their memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        if _WAITS & set(func.tags) and not _indexes_by_numbers(func, args):
            raise NotCapturableError(f"{func} makes the host wait for the device")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotCapturableError(f"{func} draws from a generator")
        if func is torch.ops.aten.lift_fresh.default:
            raise NotCapturableError("a tensor is made of the host's values")
        made = func(*args, **(kwargs or {}))
        outputs = _tensors(made)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        self.own.update({_memory(t): t for t in outputs if _memory(t) not in given})
        self.calls.append((func, args, kwargs or {}, outputs))
        return made

    def poison(self) -> None:
        """Overwrite all outputs of the operators."""
        for tensor in self.own.values():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again."""
        for func, args, kwargs, outputs in self.calls:
            again = _tensors(func(*args, **kwargs))
            for old, new in zip(outputs, again, strict=True):
                if _memory(old) != _memory(new):  # else it is a view, or was written in place
                    old.copy_(new)
        self.poison()


def _indexes_by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operator indexes without masks, so that its result has a known size."""
    masks = (torch.bool, torch.uint8)
    indexes = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
    return indexes and not any(i is not None and i.dtype in masks for i in args[1])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TapeCapturer:
    """Captures steps as tapes; as on a GPU, capturing does not change what the step trains."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.captured = self.replayed = 0

    def warm_up(self, work: Callable[[], Result]) -> Result:
        return work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        kept = [(tensor, tensor.clone()) for tensor in self._trained()]
        try:
            again = self._capture(work)
        finally:
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            again()

        return replay

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            work()
        tape.poison()
        return tape.replay

    def _trained(self) -> list[Tensor]:
        wrapped = self.trainer.engine.wrapped_nets.values()
        nets = [t.detach() for w in wrapped for t in (*w.net.parameters(), *w.net.buffers())]
        moments = [m for w in wrapped for m in w.optimizer.moments.values()]  # type: ignore[attr-defined]
        return [
            *nets,
            *(t for m in moments for t in (m.exp_avg, m.exp_avg_sq)),
            self.trainer.finite_check.first_bad,
        ]


class CompiledCapturer(TapeCapturer):
    """Runs compiled nets again, which a tape cannot hold; nothing may be compiled meanwhile."""

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        def again() -> None:
            with torch.compiler.set_stance("fail_on_recompile"):
                work()

        again()
        return again
