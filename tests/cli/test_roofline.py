"""The model of what bounds a training step on a GPU: `python launch/benchmark.py roofline`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dgm.benchmarks.costs import Kind, Operation, multi_tensor_launches
from dgm.benchmarks.roofline import Machine
from dgm.benchmarks.unet_costs import step_costs
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.layers import NormAct

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"
H100 = Machine(500, 300, 3000, 2, 5, 75)


def defaults(dropout: float = 0.0) -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig(dropout=dropout), 32)


def found(operations: list[Operation], layer: str, kind: str = "", stage: str = "forward"):
    chosen = [o for o in operations if o.layer == layer and o.stage == stage]
    return [o for o in chosen if kind in ("", o.kind)]


def test_flops_are_those_that_torch_counts():
    net = defaults()
    x = torch.empty(1, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        output = net(x, torch.zeros(1, dtype=torch.int64, device="meta"))
        forward = counter.get_total_flops()
        output.sum().backward()
    operations = step_costs(net, 32).operations
    assert forward == pytest.approx(12.44e9, rel=1e-3)
    assert sum(o.flops for o in operations if o.stage == "forward") == pytest.approx(forward)
    # torch's formula for attention's gradient does not compute the scores again.
    again = sum(o.flops for o in operations if o.kind == Kind.ATTENTION and o.stage == "forward")
    both = counter.get_total_flops()
    assert sum(o.flops for o in operations) - 0.5 * again == pytest.approx(both)


def test_bytes_of_single_layers_are_those_worked_out_by_hand():
    operations = step_costs(defaults(0.1), 32).operations
    image = 2 * 128 * 32 * 32  # bytes of 128 channels in bf16
    (forward,) = found(operations, "down.0.blocks.0.conv1")
    assert forward.bytes == 2 * image and forward.fixed_bytes == 2 * 128 * 128 * 9
    assert forward.flops == 2 * 128 * 128 * 9 * 32 * 32
    backward = found(operations, "down.0.blocks.0.conv1", stage="backward")
    assert [(o.flops, o.bytes) for o in backward] == [(forward.flops, forward.bytes)] * 2
    # For the weights only: the image needs no gradient.
    assert len(found(operations, "entry", Kind.CONVOLUTION_3X3, "backward")) == 1
    norm, *_ = found(operations, "down.0.blocks.0.norm2")
    # x read, y written, an eighth of a byte of mask, `added` in bf16, mean and rstd of 32 groups
    assert norm.bytes == 2 * image + 128 * 32 * 32 / 8 + 2 * 128 + 2 * 4 * 32
    assert not found(operations, "down.0.blocks.0.conv1", Kind.BIAS)
    # The last block has 128 + 128 input channels. Its sum reads three maps, one of the shortcut for
    # each half and the convolution's, and writes one. In the backward pass the gradients
    # of both biases are computed from one read of the sum's gradient.
    assert [o.bytes for o in found(operations, "up.3.blocks.2", Kind.SUM)] == [4 * image]
    layer = "up.3.blocks.2.conv2"
    assert [o.bytes for o in found(operations, layer, Kind.BIAS, "backward")] == [image]
    # Backward from 16x16 to 8x8, 256 channels: four 8x8 maps are read, and their sum is written.
    (upsampled,) = found(operations, "up.1.resize.0", Kind.UPSAMPLE, "backward")
    assert upsampled.bytes == 5 * 2 * 256 * 8 * 8


def test_steps_are_shorter_at_higher_rates():
    costs = step_costs(defaults(0.1), 32)
    for batch in (128, 512):
        rates = (430, 500, 570, 600)
        seconds = [replace(H100, tflops=rate).step_s(costs, batch) for rate in rates]
        assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 4
    host, below = H100.host_s(costs), H100.launch_bound_below(costs)
    assert host > H100.host_s(costs, graphs=True)
    assert H100.step_s(costs, below - 1) < host <= H100.step_s(costs, below)


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
    expected = step_costs(defaults(), 32).kept_bytes
    assert kept == pytest.approx(expected, rel=0.01)


def _kept_bytes(batch: int) -> float:
    """Return the bytes per image that autograd keeps for the backward pass."""
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
    title, *rows = printed.split("\n\n")[1].splitlines()
    assert title.startswith("batch 512, 500 TFLOP/s")
    cells = [[float(cell) for cell in row.split()[-6:]] for row in rows]
    assert len(cells) == 16
    for column in zip(*cells, strict=True):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.5)
    total = sum(kind["ms"] for kind in model["by_kind"].values())
    assert sum(layer["ms"] for layer in model["by_layer"].values()) == pytest.approx(total)
    assert model["images_per_s"]["500"]["512"] == pytest.approx(512e3 / total)
    assert cells[-1][4] == pytest.approx(total, abs=1e-3)
    kept = model["memory"]
    each = (kept["kept_mb"] + kept["working_mb"]) * 1e6
    usable = 0.9 * 80e9 - kept["fixed_mb"] * 1e6
    assert kept["largest_batch"] * each <= usable < (kept["largest_batch"] + 1) * each


def test_the_page_shows_what_the_command_prints(modeled: tuple[str, dict]):
    model = modeled[1]
    page = (SCRIPT.parents[1] / "docs" / "performance.md").read_text()
    text = " ".join(page.split())
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:-1]]
        for line in page.splitlines()
        if len(cells := line.removeprefix("|").split("|")) > 3
    }

    for kind, row in model["by_kind"].items():
        gflop, mb, ms, launches = rows[kind]
        assert gflop == f"{row['gflop']:.2f}".replace("0.00", ""), kind
        assert mb in (f"{row['mb']:.1f}", f"{row['fixed_mb']:,.0f} MB a step"), kind
        assert (ms, launches) == (f"{row['ms']:.2f}", f"{row['launches']:.0f}"), kind
    for rate in ("430", "500", "570", "600"):
        expected = [f"{made:,.0f}" for made in model["images_per_s"][rate].values()]
        assert rows[f"{rate} TFLOP/s"] == expected
    memory, host = model["memory"], model["host"]
    for value in (
        f"{memory['kept_mb']:.2f} MB", f"{memory['largest_batch']:,} images",
        f"{host['launches']:,} kernels", f"{host['host_ms']:.2f} ms",
        f"below batch {host['launch_bound_below']}",
    ):  # fmt: skip
        assert value in text, value
