"""Kernels are compiled ahead of their first launch, without one being launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.nn.kernels import precompile
from dgm.nn.kernels.norm import Dropout
from dgm.nn.layers import group_norm
from dgm.rng import Draws
from dgm.training.model_summary import _compile


def normalize(purpose: str) -> Tensor:
    layer = group_norm(32, silu=True)
    layer.kernels = "triton"
    index = torch.arange(2)
    x = torch.randn(2, 32, 8, 8)
    y: Tensor = layer(x, dropout=Dropout(0.1, Draws.of(0, index, index), purpose))
    return y


def test_launches_of_both_passes_are_recorded_and_not_executed():
    with precompile.collect() as launches:
        y = normalize("dropout/down0.0")
    assert not y.any() and y.shape == (2, 32, 8, 8)
    assert [kernel.__name__ for kernel, *_ in launches.kinds.values()] == ["forward", "backward"]
    for _, given, _ in launches.kinds.values():
        assert not any(isinstance(part, Tensor) for part in given)  # they would hold memory
    assert normalize("dropout/down0.0").any() and not precompile.collecting()


def test_on_a_cpu_nothing_is_collected():
    with precompile.collect_on(torch.device("cpu")) as launches:
        assert not precompile.collecting()
        assert normalize("dropout/down0.0").any()
    assert launches.compile() == 0


class Uncompilable:
    """A kernel whose compilation fails."""

    def __init__(self, error: Exception):
        self.error = error

    def warmup(self, *given: Any, grid: tuple[int, ...], **options: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error, message",
    [
        (FileNotFoundError(2, "No such file or directory", "/nowhere"), "/nowhere"),
        (RuntimeError("first line\nFailed to find C compiler"), "Failed to find C compiler"),
        (AssertionError(), "AssertionError: no message"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_one_line(error: Exception, message: str):
    launches = precompile.Launches()
    launches.add(Uncompilable(error), (), {})
    with pytest.raises(UserError, match=r"set train\.kernels") as raised:
        _compile(launches)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    asynchronous = pytest.importorskip("triton.runtime._async_compile")
    assert asynchronous.active_mode.get() is None
