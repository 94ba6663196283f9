"""The training loops that `benchmark.py step` compares, each in a process of its own.

Run as `python -m dgm.benchmarks.loops JSON`; it then answers one JSON line for each on stdin:
`{"go": N}` trains N steps, `{"parts": N}` tells where the time of our own steps goes,
`{"profile": N}` on which operations, `{"tell": 1}` what the loop is and what it took.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dgm.benchmarks.machine import time_convolution
from dgm.benchmarks.peer_loops import (
    DIFFUSERS,
    DIFFUSERS_COMPILED,
    LUCIDRAINS,
    Diffusers,
    Lucidrains,
)
from dgm.benchmarks.profiling import count_conversions, time_by_name
from dgm.cli.entry import run
from dgm.training.metrics_log import peak_memory_gib
from dgm.training.optimizer import torch_adamw

TORCHS_CONVOLUTIONS = "aten::mkldnn_convolution", "aten::convolution_backward"


class Loop(Protocol):
    """A training loop that can be asked for some steps."""

    net: nn.Module

    def go(self, steps: int) -> None:
        """Train so many steps."""
        ...


class Ours:
    """The loop of `launch/train_ddpm.py`, as it is or with some of what makes it fast undone."""

    def __init__(self, asked: dict[str, Any]):
        from dgm.cli.assemble import make_job
        from dgm.cli.parser import parse
        from dgm.cli.start_engine import start_engine
        from dgm.cli.train_ddpm import Config, make_parts
        from dgm.training.run_folder import RunFolder
        from dgm.training.trainer import Trainer
        from shards.reader import open_shards

        folder, batch = Path(asked["folder"]) / "run", asked["batch"]
        config: Any = parse(
            Config,
            "ddpm_cifar10.yaml",
            [
                f"--run.dir={folder}",
                f"--data.shards={asked['shards']}",
                f"--model.channels={asked['channels']}",
                "--model.dropout=0",  # the others have none either
                "--diffusion.class_conditional=false",
                "--sample.guidance=1",
                f"--train.global_batch={batch}",
                f"--train.total_images={10**9}",
                f"--train.log_every_images={20 * batch}",
                f"--train.sample_every_images={10**9}",
                "--train.save_every_images=0",
                f"--train.mixed_precision={asked['precision']}",
                *asked["options"],
            ],
        )
        self.engine = start_engine(
            config.train.mixed_precision,
            deterministic=config.train.deterministic, tf32=config.train.tf32,
        )  # fmt: skip
        images = open_shards(asked["shards"])
        parts = make_parts(config, images.image_shape, images.num_classes)
        job = make_job(config, self.engine, images, parts)
        self.net, self.losses = job.nets["net"], []  # type: ignore[var-annotated]
        self.trainer = Trainer(job)
        opened = RunFolder(config, folder)
        self.engine.on_main(opened.open)
        self.trainer.restore()
        self.engine.on_main(opened.write_config)
        self.trainer.start_logging()
        self._keep_losses()
        for name in asked["undone"]:
            getattr(self, f"without_{name}")()

    def go(self, steps: int) -> None:
        """Train so many steps."""
        for _ in range(steps):
            self.trainer.train_step()
            self.trainer.after_step()

    def _keep_losses(self) -> None:
        add = self.trainer.meter.add  # of recorded steps too, whose loss is computed out of sight

        def keep(names: Sequence[str], values: Tensor) -> None:
            self.losses.append(values[names.index("train/loss")].detach().clone())
            add(names, values)

        self.trainer.meter.add = keep  # type: ignore[method-assign]

    def without_channels_last(self) -> None:
        """Keep weights and activations as [B, C, H, W] in memory."""
        net: Any = self.net
        net.to(memory_format=torch.contiguous_format)
        net.register_forward_pre_hook(lambda net, given: (given[0].contiguous(), *given[1:]))

    def without_fused_updates(self) -> None:
        """Update weights and their average tensor by tensor, in several passes each."""
        wrapped: Any = self.engine.wrapped_nets["net"]
        ours, ema = wrapped.optimizer, self.trainer.ema
        theirs = torch_adamw(ours.parameters, ours.config)
        (group,) = theirs.param_groups
        group.update(fused=False, foreach=False)

        def step(lr: float, skip: Tensor | None, average: Any) -> bool:
            group["lr"] = lr
            theirs.step()
            return False

        ours.native, ours.step = False, step

        @torch.no_grad()
        def update(nets: Any, images_seen: int, batch: int, averaged: Any) -> None:
            share = 1 - 0.5 ** (batch / min(ema.halflife_images, images_seen * ema.rampup))
            pairs = zip(ema.nets["net"].parameters(), nets["net"].parameters(), strict=True)
            for average, weight in pairs:
                average.mul_(1 - share).add_(weight, alpha=share)

        ema.update = update  # type: ignore[method-assign, assignment]

    def parts(self, steps: int) -> dict[str, float]:
        """Give seconds of a step: whole, forward and backward; and convolutions in it and alone.

        Of the fastest step each, for what else a machine does only adds to one.
        """
        spent = {"forward": 0.0, "backward": 0.0}
        began: list[float] = []
        wrapped = self.engine.wrapped_nets["net"]
        hooks = [
            self.net.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
            self.net.register_forward_hook(
                lambda *_: _add(spent, "forward", time.perf_counter() - began.pop())
            ),
        ]
        backward = wrapped.backward

        def timed_backward(loss: Tensor) -> None:
            start = time.perf_counter()
            backward(loss)
            _add(spent, "backward", time.perf_counter() - start)

        wrapped.backward = timed_backward  # type: ignore[method-assign]
        found = []
        for _ in range(steps):
            before, start = dict(spent), time.perf_counter()
            self.go(1)
            whole, own = time.perf_counter() - start, {k: v - before[k] for k, v in spent.items()}
            found.append((whole, own["forward"] + own["backward"]))
        for hook in hooks:
            hook.remove()
        wrapped.backward = backward  # type: ignore[method-assign]
        whole, both = min(found)
        return {
            "step_s": whole,
            "forward_backward_s": both,
            "convolutions_s": min(self._convolutions_inside() for _ in range(steps)),
            "convolutions_alone_s": self._convolutions_alone(),
        }

    def profile(self, steps: int) -> dict[str, Any]:
        """Say what steps are spent on, how often a layout is converted, how often the host waits.

        The last is None on a CPU, which does not wait for itself.
        """
        kinds = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = self.engine.device.type == "cuda"
        waits: int | None = None
        if on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            waits = self._waits()
        self.go(1)
        with torch.profiler.profile(activities=kinds, record_shapes=True) as trace:
            self.go(steps)
        spent = time_by_name(trace.key_averages(), on_gpu)
        whole = sum(spent.values()) or 1
        most = sorted(spent.items(), key=lambda item: -item[1])[:10]
        return {
            "shares": [(name, time / whole) for name, time in most],
            "conversions": count_conversions(trace.events()) / steps,
            "synchronisations": waits,
        }

    def _waits(self) -> int:
        """Count how often a step makes the host wait for the GPU."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.go(1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def _convolutions_inside(self) -> float:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            self.go(1)
        events = {event.key: event.cpu_time_total for event in trace.key_averages()}
        # Autograd has names of its own for what an operator of ours does.
        ours = "dgm::conv3x3", "GeneratedBackwardFor_dgm_conv3x3_default"
        ours_back = "dgm::conv3x3_backward", "GeneratedBackwardFor_dgm_conv3x3_defaultBackward"
        spent = [events.get(name, 0) for name in (*TORCHS_CONVOLUTIONS, *ours)]
        return (sum(spent) + max(events.get(name, 0) for name in ours_back)) / 1e6

    def _convolutions_alone(self) -> float:
        """Time each convolution of the net, both ways, on numbers that nothing else touches."""
        seen: dict[tuple[Any, ...], int] = {}

        def see(module: Any, given: tuple[Tensor], _: Tensor) -> None:
            key = (
                tuple(given[0].shape), tuple(module.weight.shape), module.stride, module.padding,
                given[0].requires_grad,
            )  # fmt: skip
            seen[key] = seen.get(key, 0) + 1

        layers = [m for m in self.net.modules() if isinstance(m, nn.Conv2d)]
        hooks = [layer.register_forward_hook(see) for layer in layers]
        with torch.compiler.set_stance("force_eager"):  # compiled code has no such hooks
            self.go(1)
        for hook in hooks:
            hook.remove()
        return sum(count * time_convolution(*key) for key, count in seen.items())


def _add(spent: dict[str, float], name: str, seconds: float) -> None:
    spent[name] += seconds


def gflop(net: nn.Module, device: torch.device) -> float:
    """Count what a forward pass takes for one image, a multiplication and an addition as two."""
    x, t = torch.zeros(2, 3, 32, 32, device=device), torch.zeros(2, dtype=torch.long, device=device)
    # Eager: a compiled net would be compiled once more, for two images.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            net(x, t)
    return counter.get_total_flops() / 2 / 1e9


def main() -> None:
    """Answer until nobody asks any more."""
    # What libraries print is not for the asker.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    kinds: dict[str, Any] = {
        DIFFUSERS: Diffusers,
        DIFFUSERS_COMPILED: functools.partial(Diffusers, compiled=True),
        LUCIDRAINS: Lucidrains,
    }
    loop: Loop = kinds.get(asked["loop"], Ours)(asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loop.go(asked["warm_up"])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "go" in request:
            start = time.perf_counter()
            loop.go(request["go"])
            if device.type == "cuda":
                torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - start}
        elif "parts" in request and isinstance(loop, Ours):
            answer = loop.parts(request["parts"])
        elif "profile" in request and isinstance(loop, Ours):
            answer = loop.profile(request["profile"])
        elif "tell" in request:
            answer = _tell(loop, device)
        print(json.dumps(answer), file=answers, flush=True)


def _tell(loop: Loop, device: torch.device) -> dict[str, Any]:
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    losses = torch.stack(loop.losses).tolist() if isinstance(loop, Ours) else []
    return {
        "peak_gib": peak_memory_gib(torch.device("cpu")),
        "peak_gpu_gib": on_gpu,
        "parameters": sum(p.numel() for p in loop.net.parameters()),
        "gflop": gflop(loop.net, device),
        "losses": losses,
    }


if __name__ == "__main__":
    run(main)
