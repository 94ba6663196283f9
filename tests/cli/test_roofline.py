"""The model of what bounds a training step on a GPU: `python launch/benchmark.py roofline`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from dgm.benchmarks import roofline
from dgm.benchmarks.costs import (
    BEFORE,
    DESIGNS,
    NEXT,
    NOW,
    OUTSIDE_NET,
    Kind,
    Operation,
    multi_tensor_launches,
)
from dgm.benchmarks.roofline import Machine, count_flops
from dgm.benchmarks.unet_costs import step_costs
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.layers import NormAct

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"
NAMES = [design.name for design in DESIGNS]
H100 = Machine(500, 300, 3000, 2, 5, 75)
INDUCTOR_KERNELS = 430 + 818
"""Kernels forward and backward in what torch 2.11's inductor generates for an H100 of the net of
defaults without dropout, bf16, batch 512; a gradient of a convolution counted as two kernels, one
of attention as three."""


def defaults(dropout: float = 0.0) -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig(dropout=dropout), 32)


def found(operations: list[Operation], layer: str, kind: str = "", stage: str = "forward"):
    chosen = [o for o in operations if o.layer == layer and o.stage == stage]
    return [o for o in chosen if kind in ("", o.kind)]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda d: d.name)
def test_flops_are_those_that_torch_counts(design):
    net = defaults()
    costs = step_costs(net, 32, design)
    forward, both = count_flops(net, 32)
    assert forward == pytest.approx(12.44e9, rel=1e-3)
    assert sum(o.flops for o in costs.operations if o.stage == "forward") == pytest.approx(forward)
    # torch's formula for attention's gradient does not compute the scores again.
    again = sum(
        o.flops for o in costs.operations if o.kind == Kind.ATTENTION and o.stage == "forward"
    )
    assert sum(o.flops for o in costs.operations) - 0.5 * again == pytest.approx(both)


def test_bytes_of_single_layers_are_those_worked_out_by_hand():
    operations = step_costs(defaults(0.1), 32, NOW).operations
    image = 2 * 128 * 32 * 32  # bytes of 128 channels in bf16
    (forward,) = found(operations, "down0.0.conv1")
    assert forward.bytes == 2 * image and forward.fixed_bytes == 2 * 128 * 128 * 9
    assert forward.flops == 2 * 128 * 128 * 9 * 32 * 32
    backward = found(operations, "down0.0.conv1", stage="backward")
    assert [(o.flops, o.bytes) for o in backward] == [(forward.flops, forward.bytes)] * 2
    assert (
        len(found(operations, "entry", Kind.CONVOLUTION_3X3, "backward")) == 1
    )  # no image's gradient
    norm, *_ = found(operations, "down0.0.norm2")
    # x read, y written, mask an eighth of a byte, added in bf16, mean and rstd of 32 groups
    assert norm.bytes == 2 * image + 128 * 32 * 32 / 8 + 2 * 128 + 2 * 4 * 32
    assert not found(operations, "down0.0.conv1", Kind.BIAS)
    # The last block, of 128 + 128 channels: two products of the shortcut and the convolution
    # read, the sum written; at the output both bias gradients in one pass.
    assert [o.bytes for o in found(operations, "up0.2", Kind.SUM)] == [4 * image]
    assert [o.bytes for o in found(operations, "up0.2.conv2", Kind.BIAS, "backward")] == [image]


def test_designs_differ_in_bytes_as_described():
    image = 2 * 128 * 32 * 32
    of = {d.name: step_costs(defaults(0.1), 32, d).operations for d in DESIGNS}
    folded = [o.bytes for o in of["before"] if o.layer == "down0.0.conv1" and o.kind == Kind.BIAS]
    assert folded == [2 * image, image]  # read and written; its gradient read
    # Joined, the skip is read and written; the shortcut is one product of 256 channels.
    assert [o.bytes for o in of["before"] if o.kind == Kind.JOIN][-1] == 2 * image
    shortcut = {
        name: sum(o.bytes for o in operations if o.layer == "up0.2.shortcut")
        for name, operations in of.items()
    }
    assert shortcut == {"before": 9 * image, "now": 12 * image, "next": 9 * image}
    # 8x8 to 16x16 of 256 channels: a sum reads four maps and writes one.
    small = 2 * 256 * 8 * 8
    (upsampled,) = found(of["now"], "up2.resize", Kind.UPSAMPLE, "backward")
    assert upsampled.bytes == 5 * small
    # Zeroed and rounded in fp32, atomics on four times as many, two convolutions that copy.
    scattered = found(of["before"], "up2.resize", Kind.UPSAMPLE, "backward")
    assert sum(o.bytes for o in scattered) == (2 + (4 + 16) + 3 + 4) * small


def test_launches_of_the_net_are_those_that_inductor_generates():
    costs = step_costs(defaults(), 32, BEFORE)
    kernels = sum(o.launches for o in costs.operations if o.kind not in OUTSIDE_NET)
    copies = 3 + 2 + 2  # into channels_last, within torch's gradient of a convolution
    assert abs(kernels - copies - INDUCTOR_KERNELS) <= 3


def test_more_rate_and_better_designs_are_faster():
    costs = [step_costs(defaults(0.1), 32, design) for design in (BEFORE, NOW, NEXT)]
    for batch in (1, 128, 512):
        seconds = [
            [replace(H100, tflops=rate).step_s(each, batch) for rate in (430, 500, 570, 600)]
            for each in costs
        ]
        for slower, faster in pairwise(seconds):
            assert all(b < a for a, b in zip(slower, faster, strict=True)), batch
        if batch > 1:  # alone an image is bound by the kernels' minimum time
            assert all(b < a for rates in seconds for a, b in pairwise(rates)), batch
        assert H100.host_s(costs[0]) > H100.host_s(costs[1]) > H100.host_s(costs[1], graphs=True)
    below = H100.launch_bound_below(costs[1])
    host = H100.host_s(costs[1])
    assert H100.step_s(costs[1], below - 1) < host <= H100.step_s(costs[1], below)


def test_an_operation_takes_the_longest_of_its_three_times():
    def seconds(**work: float) -> float:
        return H100.seconds(Operation(Kind.SUM, "", "forward", **work), batch=2)  # type: ignore[arg-type]

    assert seconds(flops=5e12) == pytest.approx(2 * 5e12 / 500e12)
    assert seconds(bytes=6e9, fixed_bytes=3e9, flops=1) == pytest.approx((2 * 6e9 + 3e9) / 3e12)
    assert seconds(launches=7, bytes=1) == pytest.approx(14e-6)
    attention = Operation(Kind.ATTENTION, "", "forward", flops=3e12)
    assert H100.seconds(attention, 1) == pytest.approx(3e12 / 300e12)


class Fused(torch.autograd.Function):
    """Keep for attention's gradient what fused kernels keep."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, lse)
        return out


def test_kept_bytes_are_those_that_autograd_keeps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(functional, "scaled_dot_product_attention", Fused.apply)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():  # not on meta: there convolutions give up channels_last
            kept = _kept_bytes(64)
    finally:
        torch.set_default_dtype(usual)
    expected = step_costs(defaults(), 32, NOW).kept_bytes
    assert kept == pytest.approx(expected, rel=0.01)


def _kept_bytes(batch: int) -> float:
    """Return the bytes that autograd keeps of an image."""
    net = UNet(UNetConfig(dropout=0.0), 32)
    for module in net.modules():
        if isinstance(module, NormAct):
            module.kernels = "triton"  # whose shapes are known without a GPU
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(batch, 3, 32, 32)
    x = x.to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(x, torch.zeros(batch, dtype=torch.int64))
    assert output.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / batch


def test_foreach_operations_are_split_as_torch_does():
    assert multi_tensor_launches([1] * 110, 1) == 1
    assert multi_tensor_launches([1] * 111, 1) == 2
    assert multi_tensor_launches([1] * 73, 4) == 3
    assert multi_tensor_launches([65_536 * 320], 1) == 1
    assert multi_tensor_launches([65_536 * 320 + 1], 1) == 2
    assert multi_tensor_launches([65_536 * 320 + 1] + [1] * 109, 1) == 2
    assert multi_tensor_launches([], 1) == 0


@pytest.fixture(scope="module")
def modeled(run_warm: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Return what the command prints and writes, with its defaults."""
    out = tmp_path_factory.mktemp("roofline") / "roofline.json"
    done = run_warm(SCRIPT, "roofline", "--json", out)
    assert done.code == 0, done.stderr
    return done.stdout, json.loads(out.read_text())["roofline"]


def test_tables_add_up(modeled: tuple[str, dict]):
    printed, model = modeled
    assert model["parameters"] == 35_746_307
    tables = printed.split("\n\n")[1:4]
    for design, table in zip(NAMES, tables, strict=True):
        title, *rows = table.splitlines()
        assert title.startswith(f"{design}, batch 512, 500 TFLOP/s")
        cells = [[float(cell) for cell in row.split()[-6:]] for row in rows]
        assert len(cells) == 17
        for column in zip(*cells, strict=True):
            assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.5)
        by_layer = model[design]["by_layer"].values()
        total = sum(kind["ms"] for kind in model[design]["by_kind"].values())
        assert sum(layer["ms"] for layer in by_layer) == pytest.approx(total)
        rates = model[design]["images_per_s"]
        assert rates["512"]["500"] == pytest.approx(512e3 / total)
        assert cells[-1][4] == pytest.approx(total, abs=1e-3)
        kept = model[design]["memory"]
        each = (kept["kept_mb"] + kept["working_mb"]) * 1e6
        usable = 0.9 * 80e9 - kept["fixed_mb"] * 1e6
        assert kept["largest_batch"] * each <= usable < (kept["largest_batch"] + 1) * each


def test_the_page_shows_what_the_command_prints(modeled: tuple[str, dict]):
    model = modeled[1]
    page = (SCRIPT.parents[1] / "docs" / "performance.md").read_text()
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:-1]]
        for line in page.splitlines()
        if len(cells := line.removeprefix("|").split("|")) > 3
    }

    def formatted(values: Iterable[float], form: str) -> str:
        texts = [f"{value:{form}}" for value in values]
        return texts[0] if len(set(texts)) == 1 else ", ".join(texts)

    for kind in model["now"]["by_kind"]:
        of = [model[name]["by_kind"][kind] for name in NAMES]
        gflop, mb, ms, launches = rows[kind]
        assert gflop == formatted((o["gflop"] for o in of), ".2f").replace("0.00", ""), kind
        fixed = f"{of[0]['fixed_mb']:,.0f} MB a step"
        assert mb in (formatted((o["mb"] for o in of), ".1f"), fixed), kind
        assert ms == formatted((o["ms"] for o in of), ".2f"), kind
        assert launches.startswith(formatted((o["launches"] for o in of), ".0f")), kind
    for rate in ("430", "500", "570", "600"):
        assert rows[f"{rate} TFLOP/s"] == [
            f"{model[name]['images_per_s'][batch][rate]:,.0f}"
            for batch in ("128", "256", "512")
            for name in NAMES
        ]
    for row, part, key, form in (
        ("kept for the backward pass, MB an image", "memory", "kept_mb", ".2f"),
        ("largest batch in 90 % of 80 GB", "memory", "largest_batch", ",.0f"),
        ("kernels of a step", "host", "launches", ",.0f"),
        ("the host launches them in", "host", "host_ms", ".2f"),
        ("the host bounds steps below batch (at 500 TFLOP/s)", "host", "launch_bound_below", ".0f"),
    ):
        texts = [cell.removesuffix(" ms") for cell in rows[row]]
        assert texts == [f"{model[name][part][key]:{form}}" for name in NAMES], row


def test_a_model_that_does_not_follow_the_net_is_a_defect(monkeypatch: pytest.MonkeyPatch):
    parser = ArgumentParser()
    roofline.add_arguments(parser)
    monkeypatch.setattr(roofline, "count_flops", lambda net, size: (12.6e9, 37e9))
    with pytest.raises(RuntimeError, match="does not follow the net"):
        roofline.measure(parser.parse_args([], Namespace()))
