"""The training loops that `benchmark.py step` compares, each in a process of its own.

Run as `python -m dgm.benchmarks.loops JSON`. It answers each request, a JSON line on stdin, by one:
`{"train": N}` trains N steps; `{"profile": N}` profiles N of our own steps; `{"summary": 1}`
returns parameters, FLOPs, memory and losses.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import record_function

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

# Autograd names the operations of a custom operator differently.
CONVOLUTIONS = (
    "aten::mkldnn_convolution",
    "aten::convolution_backward",
    "dgm::conv3x3",
    "GeneratedBackwardFor_dgm_conv3x3_default",
)
CONVOLUTIONS_BACK = "dgm::conv3x3_backward", "GeneratedBackwardFor_dgm_conv3x3_defaultBackward"


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
        # Read from the meter, since no Python code of the loss runs in captured steps.
        add = self.trainer.meter.add

        def keep(names: Sequence[str], values: Tensor) -> None:
            self.losses.append(values[names.index("train/loss")].detach().clone())
            add(names, values)

        self.trainer.meter.add = keep
        for name in settings["undone"]:
            getattr(self, f"without_{name}")()

    def train(self, steps: int) -> None:
        """Train `steps` steps."""
        for _ in range(steps):
            self.trainer.train_step()
            self.trainer.after_step()

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

    def profile(self, steps: int) -> dict[str, Any]:
        """Return the operations of a step by time; on a CPU also the seconds of its parts.

        `convolutions_alone_s` is the time of the same convolutions by torch, outside the net.
        """
        on_gpu = self.engine.device.type == "cuda"
        wrapped = self.engine.wrapped_nets["net"]
        for name in ("forward", "backward"):
            setattr(wrapped, name, record_function(name)(getattr(wrapped, name)))
        self.train(1)
        with torch.profiler.profile() as trace:
            start = time.perf_counter()
            self.train(steps)
            seconds = time.perf_counter() - start
        averages = trace.key_averages()
        spent = time_by_name(averages, on_gpu)
        total = sum(spent.values()) or 1
        longest = sorted(spent.items(), key=lambda item: -item[1])[:10]
        profile = {
            "fractions": [(name, time / total) for name, time in longest],
            "conversions": count_conversions(trace.events()) / steps,
        }
        if on_gpu:
            return {"profile": profile}
        whole = {event.key: event.cpu_time_total / steps / 1e6 for event in averages}
        convolutions = sum(whole.get(name, 0) for name in CONVOLUTIONS)
        parts = {
            "step_s": seconds / steps,
            "forward_backward_s": whole["forward"] + whole["backward"],
            "convolutions_s": convolutions + max(whole.get(name, 0) for name in CONVOLUTIONS_BACK),
            "convolutions_alone_s": self._convolutions_alone(),
        }
        return {"profile": profile, "parts": parts}

    def _convolutions_alone(self) -> float:
        """Return the seconds of torch's convolutions, each timed alone, forward and backward."""
        spent: list[float] = []

        def time_alone(module: Any, args: tuple[Tensor], output: Any) -> None:
            x = args[0].detach().requires_grad_(args[0].requires_grad)
            inputs = [part for part in (x, *module.parameters()) if part.requires_grad]
            settings = module.weight, module.bias, module.stride, module.padding
            grad = torch.randn_like(functional.conv2d(x, *settings))

            def both_passes() -> None:
                torch.autograd.grad(functional.conv2d(x, *settings), inputs, grad)

            spent.append(machine.best_s(both_passes))

        layers = [m for m in self.net.modules() if isinstance(m, nn.Conv2d)]
        hooks = [layer.register_forward_hook(time_alone) for layer in layers]
        with torch.compiler.set_stance("force_eager"):  # compiled code has no such hooks
            self.train(1)
        for hook in hooks:
            hook.remove()
        return sum(spent)


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


def main() -> None:
    """Answer requests until stdin is closed."""
    # Keep stdout for answers: what libraries print there goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    kinds: dict[str, Any] = {
        DIFFUSERS: Diffusers,
        DIFFUSERS_COMPILED: functools.partial(Diffusers, compiled=True),
        LUCIDRAINS: Lucidrains,
    }
    loop = kinds.get(settings["loop"], Ours)(settings)
    loop.train(settings["warm_up"])
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "train" in request:
            start = time.perf_counter()
            loop.train(request["train"])
            machine.wait()
            answer = {"seconds": time.perf_counter() - start}
        elif "profile" in request:
            answer = loop.profile(request["profile"])
        elif "summary" in request:
            answer = {
                "peak_gib": peak_memory_gib(torch.device("cpu")),
                "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30,
                "parameters": sum(p.numel() for p in loop.net.parameters()),
                "gflop": machine.gflop(loop.net, machine.device()),
                "losses": [float(loss) for loss in getattr(loop, "losses", ())],
            }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    run(main)
