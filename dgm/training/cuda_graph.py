"""A phase's whole optimizer step as one CUDA graph, for runs that are bound by kernel launches.

A graph replays the launches of one step, on the same memory, with one call from the host. What
capturing a step requires of it (pytorch.org, "CUDA semantics", section "CUDA Graphs"), and how that
is met:

- The host does not wait, and copies only from pinned memory: `FiniteCheck` records on the device,
  metrics are one tensor, draws are functions of tensors (no generator state).
- Everything that changes between steps is in tensors at fixed addresses (`StaticInputs`): image
  indices, images seen, learning rate, counts of updates, and images that are not on the device.
  The host overwrites the numbers by one copy from pinned memory, the images by another. If the
  work differs between steps (a penalty in every 16th), each variant has a
  graph, see `dgm.objective.StepDependent`.
- Weights, moments, buffers, the finite check's record and the output are outside of the graph's
  memory pool and are written in place. Nothing in the pool outlives a replay: gradients are None
  before and after a step, and autocast's copies of weights are made and freed within it. So all
  graphs of a run share one pool. Loading weights in place (`load_full_state`), sampling and
  evaluating leave graphs valid; new moments (`AdamW.load_moments`) would not, and are set only
  before the first step.
- Compiling, autotuning and the allocations of cuDNN and cuBLAS are over: the first steps of each
  variant run eagerly, from the same inputs and on the capturing stream (gradients are
  accumulated on the stream where autograd first used their weights). They are steps of the run.

Capturing executes nothing, and the host counts updates only after a replay, so after a failed
capture the same step can run eagerly. The moving average is updated after a replay, as after
other steps, by one call: torch has no `_foreach_lerp_` with a weight on the device, and the
equivalent moves 8/3 times the bytes. A graph keeps the memory of a step reserved, also while the
run samples. A restarted run captures again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dgm.objective import Batch, Phase
from dgm.rng import Draws
from dgm.training.ddp import DataParallelNet
from dgm.training.engine import Engine
from dgm.training.optimizer import AdamMoments
from dgm.training.sampler import BatchSampler

Result = TypeVar("Result")
MicroBatches = Iterable[tuple[Batch, Draws]]

WARM_UP = 3
"""Steps of each variant before one is captured."""


@dataclass(frozen=True)
class StepNumbers:
    """The numbers that the host gives to a step."""

    images_seen: int  # before the step
    step: int
    gradient_index: int  # see FiniteCheck
    lr: float


@dataclass
class StepOutput:
    """Means over the micro-batches of a step: `values` is float64 [len(names)]."""

    names: tuple[str, ...]
    values: Tensor
    averaged: bool  # the optimizer's pass also updated the moving average


class CudaCapturer:
    """Capture CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Do work on the capturing stream, synchronized with the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that replays the work's launches on the current stream."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer stream context restores the stream: in torch 2.11 a failed capture does
            # not. Compiling cannot be captured, so it raises.
            with (
                torch.compiler.set_stance("fail_on_recompile"),
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
            ):
                work()
        except BaseException:
            # In torch 2.11 the allocator stays in capture mode, in which it does not reuse memory
            # (pytorch #180395); later versions leave it by themselves and raise here.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            raise
        return graph.replay


class StaticInputs:
    """Tensors at fixed addresses with everything that changes between steps."""

    def __init__(self, batches: BatchSampler, device: torch.device, num_parameters: int):
        """Allocate the tensors for micro-batches of `batches` and a net of `num_parameters`."""
        self.batches, self.loader = batches, batches.loader(device)
        resident = self.loader.resident is not None
        shape = (batches.num_micro, 2 if resident else 3, batches.micro_batch)
        sizes = (torch.Size(shape).numel(), 1, 1, 1, num_parameters)
        self.numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        index, seen, gradient_index, lr, self.counts = self.numbers.split(sizes)
        self.index = index.view(shape)  # images, epochs and, where images are not resident, labels
        self.images_seen, self.gradient_index = seen[0], gradient_index[0]
        self.lr = lr.view(torch.float64)[0]
        self.images: Tensor | None = None
        if not resident:
            one = self.loader.read(torch.zeros(1, dtype=torch.int64))[0]
            size = (batches.num_micro, batches.micro_batch, *one.shape[1:])
            self.images = torch.empty(size, dtype=torch.uint8, device=device)

    def fill(self, now: StepNumbers, counts: list[int]) -> None:
        """Overwrite the tensors for a step; `counts` as returned by `AdamW.counts`."""
        index = self.batches.indices(now.images_seen)
        if self.images is not None:
            images, labels = self.loader.read(index[:, 0].flatten())
            self.loader.overwrite(self.images, images.view(self.images.shape))
            index = torch.cat([index, labels.view(len(index), 1, -1)], 1)
        lr = torch.tensor([now.lr], dtype=torch.float64).view(torch.int64)
        others = torch.tensor([now.images_seen, now.gradient_index])
        packed = torch.cat([index.flatten(), others, lr, torch.tensor(counts)])
        self.loader.overwrite(self.numbers, packed)

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, Draws]]:
        """Yield the micro-batches of the current inputs; a graph keeps this `step`."""
        for k, index in enumerate(self.index):
            if self.images is None:
                images, labels = self.loader.gather(index[0])
            else:
                images, labels = self.images[k], index[2]
            key = self.loader.key(self.batches.seed)
            yield Batch(images, labels, self.images_seen, step), Draws(key, index[0], index[1])


UpdateNet = Callable[[Phase, MicroBatches, float, int | Tensor], StepOutput]
"""Updates a phase's net: (phase, micro-batches, learning rate, gradient index)."""


class CapturedStep:
    """Steps of one variant: the first ones run eagerly, later ones replay a captured one."""

    def __init__(
        self,
        engine: Engine,
        batches: BatchSampler,
        phase: Phase,
        update_net: UpdateNet,
        capturer: CudaCapturer,
    ):
        wrapped = engine.wrapped_nets[phase.net]
        assert isinstance(wrapped, DataParallelNet), "steps are captured on one process only"
        self.phase, self.update_net, self.capturer = phase, update_net, capturer
        self.optimizer = wrapped.optimizer
        self.inputs = StaticInputs(batches, engine.device, len(self.optimizer.parameters))
        self.warm = 0
        self.output: StepOutput | None = None
        self.replay: Callable[[], None] | None = None
        self._updated: list[AdamMoments] = []

    def fill(self, now: StepNumbers) -> None:
        """Copy a step's numbers and images to the device."""
        self.inputs.fill(now, self.optimizer.counts())

    def run(self, now: StepNumbers) -> StepOutput | None:
        """Run the step of the current inputs; return None if it cannot be captured."""
        if self.warm < WARM_UP:
            self.warm += 1
            self.output = self.capturer.warm_up(lambda: self._step(now))
        else:
            if self.replay is None and not self._capture(now):
                return None
            assert self.replay is not None, "it was just captured"
            self.replay()
        for moments in self._updated:
            moments.step += 1
        return self.output

    def _step(self, now: StepNumbers) -> StepOutput:
        inputs = self.inputs
        with self.optimizer.on_device(inputs.lr.float(), inputs.counts.float()) as update:
            micro_batches = inputs.micro_batches(now.step)
            output = self.update_net(self.phase, micro_batches, now.lr, inputs.gradient_index)
        self._updated = update.updated
        return output

    def _capture(self, now: StepNumbers) -> bool:
        """Capture a step that writes its values to a fixed tensor; return whether it succeeded."""
        assert self.output is not None, "the first steps have one"
        values, known = torch.empty_like(self.output.values), len(self.optimizer.moments)

        def work() -> None:
            output = self._step(now)
            if len(self.optimizer.moments) > known:
                raise RuntimeError("a weight has its first gradient only now")
            values.copy_(output.values)
            self.output = StepOutput(output.names, values, output.averaged)

        try:
            self.replay = self.capturer.capture(work)
        except Exception as error:  # of CUDA, or of an objective
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"train.compile graphs: the step cannot be captured as a CUDA graph ({reason[0]}), "
                "so training continues as with train.compile all",
                stacklevel=2,
            )
            self._undo(known)
        return self.replay is not None

    def _undo(self, known: int) -> None:
        """Remove gradients and moments that the failed capture left on the host."""
        for parameter in self.optimizer.parameters:
            parameter.grad = None
        for weight in list(self.optimizer.moments)[known:]:
            del self.optimizer.moments[weight]
