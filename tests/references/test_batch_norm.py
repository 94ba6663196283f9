"""BatchNorm of one and of two processes against torch.nn.BatchNorm2d on the whole batch.

Source: torch's own BatchNorm2d, in float64 for values and gradients, and in the tested dtype for
the type of what it returns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.autograd import forward_ad

from dgm.gan.batch_norm import BatchNorm

BATCH, CHANNELS, CLASSES = 8, 4, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CASES = list(itertools.product(DTYPES, (False, True)))

# bfloat16 has 8 significant bits: one rounding of the result is at most 2^-8 relative. The other
# two tolerances allow for sums over 288 values in that precision.
TOLERANCE = {
    "bfloat16": {"rtol": 2.0**-8, "atol": 1e-5},
    "float32": {"rtol": 2e-6, "atol": 2e-6},
    "float64": {"rtol": 1e-12, "atol": 1e-12},
}


def given(dtype: str) -> dict[str, Tensor]:
    """Return inputs, a direction, the gradient of the output, weights and labels."""
    generator = torch.Generator().manual_seed(3)
    kind = DTYPES[dtype]
    wide = torch.float64 if kind == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        # The mean is large beside the deviation, as it is after a ReLU.
        "x": (2 * normal(BATCH, CHANNELS, 6, 6) + 5).to(kind),
        "tangent": normal(BATCH, CHANNELS, 6, 6).to(kind),
        "grad": normal(BATCH, CHANNELS, 6, 6).to(kind),
        "weight": (normal(CLASSES, CHANNELS) + 1).to(wide),
        "bias": normal(CLASSES, CHANNELS).to(wide),
        "labels": torch.arange(BATCH) % CLASSES,
    }


def ours(dtype: str, by_class: bool) -> BatchNorm:
    norm = BatchNorm(CHANNELS, CLASSES if by_class else None)
    norm = norm.double() if dtype == "float64" else norm
    weight, bias = given(dtype)["weight"], given(dtype)["bias"]
    with torch.no_grad():
        norm.weight.copy_(weight if by_class else weight[0])
        norm.bias.copy_(bias if by_class else bias[0])
    return norm


def measure(
    run: Callable[[Tensor, Tensor], Tensor], norm: nn.Module, dtype: str, part: slice
) -> dict[str, Tensor]:
    """Return output, first and second derivatives and running statistics of a part of the batch."""
    data = given(dtype)
    labels = data["labels"][part]
    x = data["x"][part].clone().requires_grad_()
    y = run(x, labels)
    (grad_x,) = torch.autograd.grad((y * data["grad"][part]).sum(), x, create_graph=True)
    weights = [norm.get_parameter("weight"), norm.get_parameter("bias")]
    grads = torch.autograd.grad((y * data["grad"][part]).sum(), weights, retain_graph=True)
    # The gradient of the R1 penalty, which is that of a squared gradient.
    penalty = grad_x.to(weights[0].dtype).square().sum()
    second_x, second_weight = torch.autograd.grad(penalty, [x, weights[0]])
    found = {
        "y": y, "grad_x": grad_x, "second_x": second_x,
        "sum_weight": grads[0], "sum_bias": grads[1], "sum_second_weight": second_weight,
        "running_mean": norm.get_buffer("running_mean").clone(),
        "running_var": norm.get_buffer("running_var").clone(),
    }  # fmt: skip
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(data["x"][part], data["tangent"][part])
        found["jvp"] = forward_ad.unpack_dual(run(dual, labels)).tangent.clone()
    return {name: value.detach() for name, value in found.items()}


class Reference(nn.Module):
    """torch's BatchNorm2d in float64, with the scale and shift of each class if by class."""

    def __init__(self, made: BatchNorm):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS, affine=False).double()
        self.weight, self.bias = made.double().weight, made.double().bias
        self.register_buffer("running_mean", self.norm.running_mean)
        self.register_buffer("running_var", self.norm.running_var)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        by_class = self.weight.ndim == 2
        weight = self.weight[labels] if by_class else self.weight
        bias = self.bias[labels] if by_class else self.bias
        return self.norm(x.double()) * weight[..., None, None] + bias[..., None, None]


def reference(dtype: str, by_class: bool) -> dict[str, Tensor]:
    norm = Reference(ours(dtype, by_class))
    return measure(norm, norm, dtype, slice(None))


def as_part(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    found: dict[Any, Any] = {}
    for case in CASES:
        norm = ours(*case)
        found[case] = measure(norm, norm, case[0], part)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("batch_norm")
    multiprocessing.spawn(as_part, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check(found: dict[str, Tensor], dtype: str, by_class: bool) -> None:
    expected = reference(dtype, by_class)
    kind = DTYPES[dtype]
    for name in ("y", "grad_x", "second_x"):  # the tangent that torch gives bfloat16 is float32
        assert found[name].dtype == kind, name
    wide = torch.float64 if kind == torch.float64 else torch.float32
    for name, value in found.items():
        size = float(expected[name].abs().max())
        tolerance = dict(TOLERANCE[dtype])
        if name.startswith(("running", "sum")) and not name.startswith("sum_second"):
            tolerance = dict(TOLERANCE["float64" if kind == torch.float64 else "float32"])
            assert value.dtype == wide, name
        tolerance["atol"] *= max(1.0, size)
        if kind == torch.bfloat16 and ("second" in name or name == "jvp"):
            # The penalty is of a rounded gradient, and torch's kernel has no second derivative or
            # tangent of its own: it rounds their terms one by one.
            tolerance["atol"] = 2.0**-6 * size
        torch.testing.assert_close(
            value.double(), expected[name].double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype, by_class", CASES)
def test_one_process_is_torchs(dtype: str, by_class: bool):
    norm = ours(dtype, by_class)
    check(measure(norm, norm, dtype, slice(None)), dtype, by_class)
    x, labels = given(dtype)["x"], given(dtype)["labels"]
    theirs = nn.BatchNorm2d(CHANNELS, affine=False).to(norm.weight.dtype).eval()
    theirs.running_mean, theirs.running_var = norm.running_mean, norm.running_var
    weight, bias = (p[labels] if by_class else p for p in (norm.weight, norm.bias))
    wide = x.to(norm.weight.dtype)
    expected = theirs(wide) * weight[..., None, None] + bias[..., None, None]
    tolerance = {**TOLERANCE[dtype], "atol": 1e-5 if dtype != "float64" else 1e-12}
    torch.testing.assert_close(norm.eval()(x, labels), expected.to(x.dtype), **tolerance)
    norm.train()
    if not by_class:
        theirs = nn.BatchNorm2d(CHANNELS).to(norm.weight.dtype)
        assert theirs(x).dtype == norm(x).dtype == x.dtype
        assert theirs.eval()(x).dtype == norm.eval()(x).dtype == x.dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype, by_class", CASES)
def test_two_processes_are_torchs_on_the_whole_batch(
    of_two: list[dict[Any, dict[str, Tensor]]], dtype: str, by_class: bool
):
    parts = [of[dtype, by_class] for of in of_two]
    found = {}
    for name in parts[0]:
        first, second = (part[name] for part in parts)
        if name.startswith("running"):
            assert torch.equal(first, second)
            found[name] = first
        elif name.startswith("sum"):  # of parameters: each process has the part of its images
            found[name] = first + second
        else:
            found[name] = torch.cat([first, second])
    check(found, dtype, by_class)
