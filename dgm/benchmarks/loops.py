"""The training loops that `benchmark.py step` compares, each in a process of its own.

Run as `python -m dgm.benchmarks.loops JSON`. It answers each request, a JSON line on stdin, by one:
`{"train": N}` trains N steps; `{"parts": N}` times the parts of our own steps; `{"profile": N}`
profiles them; `{"summary": 1}` returns parameters, FLOPs, memory and losses.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from dgm.benchmarks import machine
from dgm.benchmarks.peer_loops import (
    DIFFUSERS,
    DIFFUSERS_COMPILED,
    LUCIDRAINS,
    Diffusers,
    Lucidrains,
)
from dgm.cli.entry import run
from dgm.training.metrics_log import peak_memory_gib
from dgm.training.optimizer import torch_adamw

TORCHS_CONVOLUTIONS = "aten::mkldnn_convolution", "aten::convolution_backward"


class Loop(Protocol):
    """A training loop that can be run for some steps."""

    net: nn.Module

    def train(self, steps: int) -> None:
        """Train `steps` steps."""
        ...


def make_trainer(config_name: str, options: list[str]) -> tuple[Any, Any]:
    """Return the trainer of `launch/train_ddpm.py` and its run folder."""
    # Imported here, so that peers' processes do not hold its memory.
    from dgm.cli.assemble import make_job
    from dgm.cli.parser import parse
    from dgm.cli.train_ddpm import Config, make_parts
    from dgm.training.process_settings import start_engine
    from dgm.training.run_folder import RunFolder
    from dgm.training.trainer import Trainer
    from shards.reader import open_shards

    config: Any = parse(Config, config_name, options)
    engine = start_engine(
        config.train.mixed_precision,
        deterministic=config.train.deterministic, tf32=config.train.tf32,
    )  # fmt: skip
    images = open_shards(config.data.shards)
    parts = make_parts(config, images.image_shape, images.num_classes)
    trainer = Trainer(make_job(config, engine, images, parts))
    return trainer, RunFolder(config, Path(config.run.dir))


class Ours:
    """The loop of `launch/train_ddpm.py`, as it is or without some optimizations."""

    def __init__(self, settings: dict[str, Any]):
        batch = settings["batch"]
        self.trainer, folder = make_trainer(
            "ddpm_cifar10.yaml",
            [
                f"--run.dir={settings['folder']}/run",
                f"--data.shards={settings['shards']}",
                f"--model.channels={settings['channels']}",
                "--model.dropout=0",  # like the peers
                "--diffusion.class_conditional=false",
                "--sample.guidance=1",
                f"--train.global_batch={batch}",
                f"--train.total_images={10**9}",
                f"--train.log_every_images={20 * batch}",
                f"--train.sample_every_images={10**9}",
                "--train.save_every_images=0",
                f"--train.mixed_precision={settings['precision']}",
                *settings["options"],
            ],
        )
        self.engine, self.net = self.trainer.engine, self.trainer.job.nets["net"]
        self.engine.on_main(folder.open)
        self.trainer.restore()
        self.engine.on_main(folder.write_config)
        self.trainer.start_logging()
        self.losses: list[Tensor] = []
        self._keep_losses()
        for name in settings["undone"]:
            getattr(self, f"without_{name}")()

    def train(self, steps: int) -> None:
        """Train `steps` steps."""
        for _ in range(steps):
            self.trainer.train_step()
            self.trainer.after_step()

    def _keep_losses(self) -> None:
        # Read from the meter, since no Python code of the loss runs in captured steps.
        add = self.trainer.meter.add

        def keep(names: Sequence[str], values: Tensor) -> None:
            self.losses.append(values[names.index("train/loss")].detach().clone())
            add(names, values)

        self.trainer.meter.add = keep

    def without_channels_last(self) -> None:
        """Store weights and activations as [B, C, H, W] in memory."""
        net: Any = self.net
        net.to(memory_format=torch.contiguous_format)
        net.register_forward_pre_hook(lambda net, args: (args[0].contiguous(), *args[1:]))

    def without_fused_updates(self) -> None:
        """Update weights and their average tensor by tensor, in several passes each."""
        ours, ema = self.engine.wrapped_nets["net"].optimizer, self.trainer.ema
        theirs = torch_adamw(ours.parameters, ours.config)
        (group,) = theirs.param_groups
        group.update(fused=False, foreach=False)

        def step(lr: float, skip: Tensor | None, average: Any) -> bool:
            group["lr"] = lr
            theirs.step()
            return False

        ours.native, ours.step = False, step

        @torch.no_grad()
        def update(nets: Any, images_seen: int, batch: int, along: Any) -> None:
            rate = 1 - 0.5 ** (batch / min(ema.halflife_images, images_seen * ema.rampup))
            pairs = zip(ema.nets["net"].parameters(), nets["net"].parameters(), strict=True)
            for average, weight in pairs:
                average.mul_(1 - rate).add_(weight, alpha=rate)

        ema.update = update

    def parts(self, steps: int) -> dict[str, float]:
        """Return seconds of a step, of its forward and backward pass, and of its convolutions.

        `convolutions_alone_s` is the time of the same convolutions outside the net. All are of the
        fastest step, as other load only adds time.
        """
        spent = start = 0.0
        wrapped = self.engine.wrapped_nets["net"]
        backward = wrapped.backward

        def begin(*_: Any) -> None:
            nonlocal start
            start = time.perf_counter()

        def end(*_: Any) -> None:
            nonlocal spent
            spent += time.perf_counter() - start

        def timed_backward(loss: Tensor) -> None:
            begin()
            backward(loss)
            end()

        hooks = [self.net.register_forward_pre_hook(begin), self.net.register_forward_hook(end)]
        wrapped.backward = timed_backward
        timed_steps = []
        for _ in range(steps):
            before, step_start = spent, time.perf_counter()
            self.train(1)
            timed_steps.append((time.perf_counter() - step_start, spent - before))
        for hook in hooks:
            hook.remove()
        wrapped.backward = backward
        step, forward_backward = min(timed_steps)
        return {
            "step_s": step,
            "forward_backward_s": forward_backward,
            "convolutions_s": min(self._convolutions_inside() for _ in range(steps)),
            "convolutions_alone_s": self._convolutions_alone(),
        }

    def profile(self, steps: int) -> dict[str, Any]:
        """Return the operations of a step by time, layout conversions, and synchronizations.

        The last is None on a CPU.
        """
        kinds = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = self.engine.device.type == "cuda"
        waits: int | None = None
        if on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            waits = self._synchronizations()
        self.train(1)
        with torch.profiler.profile(activities=kinds, record_shapes=True) as trace:
            self.train(steps)
        spent = time_by_name(trace.key_averages(), on_gpu)
        total = sum(spent.values()) or 1
        longest = sorted(spent.items(), key=lambda item: -item[1])[:10]
        return {
            "fractions": [(name, time / total) for name, time in longest],
            "conversions": count_conversions(trace.events()) / steps,
            "synchronisations": waits,
        }

    def _synchronizations(self) -> int:
        """Return how often a step makes the host wait for the GPU."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.train(1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def _convolutions_inside(self) -> float:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            self.train(1)
        events = {event.key: event.cpu_time_total for event in trace.key_averages()}
        # Autograd names the operations of a custom operator differently.
        ours = "dgm::conv3x3", "GeneratedBackwardFor_dgm_conv3x3_default"
        ours_back = "dgm::conv3x3_backward", "GeneratedBackwardFor_dgm_conv3x3_defaultBackward"
        spent = [events.get(name, 0) for name in (*TORCHS_CONVOLUTIONS, *ours)]
        return (sum(spent) + max(events.get(name, 0) for name in ours_back)) / 1e6

    def _convolutions_alone(self) -> float:
        """Return the seconds of all convolutions of the net, each timed alone on random inputs."""
        counts: collections.Counter[tuple[Any, ...]] = collections.Counter()

        def count(module: Any, args: tuple[Tensor], _: Tensor) -> None:
            x = args[0]
            shapes = tuple(x.shape), tuple(module.weight.shape)
            counts[(*shapes, module.stride, module.padding, x.requires_grad)] += 1

        layers = [m for m in self.net.modules() if isinstance(m, nn.Conv2d)]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        with torch.compiler.set_stance("force_eager"):  # compiled code has no such hooks
            self.train(1)
        for hook in hooks:
            hook.remove()
        return sum(number * machine.time_convolution(*key) for key, number in counts.items())


def time_by_name(averages: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Return microseconds by name: of a GPU's kernels and copies, or self times of CPU operators.

    `averages` is the profiler's `key_averages()`, in which the operator that launched a kernel has
    the kernel's time too, as has an annotation around both: each is counted once.
    """
    spent: dict[str, float] = {}
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in averages:
        if event.device_type != kind or event.is_user_annotation:
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[event.key] = spent.get(event.key, 0.0) + time
    return spent


def count_conversions(events: Any) -> int:
    """Return how often convolutions copied images into another memory layout."""
    return sum(
        event.name == "aten::contiguous"
        and event.cpu_parent is not None
        and "convolution" in event.cpu_parent.name
        for event in events
    )


def gflop(net: nn.Module, device: torch.device) -> float:
    """Return the GFLOP of a forward pass for one image; a multiply-add counts as two."""
    x, t = torch.zeros(2, 3, 32, 32, device=device), torch.zeros(2, dtype=torch.long, device=device)
    # Eager: a compiled net would be compiled again for this batch.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            net(x, t)
    return counter.get_total_flops() / 2 / 1e9


def main() -> None:
    """Answer requests until stdin is closed."""
    # Libraries print to stdout too: only answers go there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    kinds: dict[str, Any] = {
        DIFFUSERS: Diffusers,
        DIFFUSERS_COMPILED: functools.partial(Diffusers, compiled=True),
        LUCIDRAINS: Lucidrains,
    }
    loop: Loop = kinds.get(settings["loop"], Ours)(settings)
    loop.train(settings["warm_up"])
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "train" in request:
            start = time.perf_counter()
            loop.train(request["train"])
            machine.wait()
            answer = {"seconds": time.perf_counter() - start}
        elif "parts" in request and isinstance(loop, Ours):
            answer = loop.parts(request["parts"])
        elif "profile" in request and isinstance(loop, Ours):
            answer = loop.profile(request["profile"])
        elif "summary" in request:
            answer = _summary(loop)
        print(json.dumps(answer), file=answers, flush=True)


def _summary(loop: Loop) -> dict[str, Any]:
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    losses = torch.stack(loop.losses).tolist() if isinstance(loop, Ours) else []
    return {
        "peak_gib": peak_memory_gib(torch.device("cpu")),
        "peak_gpu_gib": on_gpu,
        "parameters": sum(p.numel() for p in loop.net.parameters()),
        "gflop": gflop(loop.net, machine.device()),
        "losses": losses,
    }


if __name__ == "__main__":
    run(main)
