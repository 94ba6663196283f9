"""Class embeddings: torch's values and gradients, and no sum whose order is left to chance."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import spectral_norm

from dgm.nn.layers import Embedding, embed

UNORDERED = ("embedding_dense_backward", "index_put", "index_add", "scatter")
"""Operators that add into rows by atomic additions on a GPU."""


def rows(dtype: torch.dtype = torch.float64, count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Give labels, most of them several times and one never, weights, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, count - 1, (64,), generator=generator)
    weight = torch.randn(count, 12, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(64, 12, generator=generator, dtype=torch.float64).to(dtype)
    return labels, weight.requires_grad_(), grad


def gradient(function: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> Tensor:
    labels, weight, grad = given
    (found,) = torch.autograd.grad(function(labels, weight), weight, grad)
    return found


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_have_the_same_bytes_and_gradients_differ_by_rounding(
    dtype: torch.dtype, shape: tuple[int, ...]
):
    labels, weight, grad = rows(dtype)
    count = torch.Size(shape).numel()
    labels, grad = labels[:count].reshape(shape), grad[:count].reshape(*shape, 12)
    assert torch.equal(embed(labels, weight), nn.functional.embedding(labels, weight))
    exact = gradient(
        nn.functional.embedding, labels, weight.detach().double().requires_grad_(), grad.double()
    )
    found = gradient(embed, labels, weight, grad)
    assert found.dtype == dtype and found.shape == weight.shape
    # bf16 is rounded once, at the end: the sum itself is in fp32.
    error = float((found.double() - exact).abs().max())
    assert error <= {8: 1e-14, 4: 1e-5, 2: 2**-8 * float(exact.abs().max() + 1)}[dtype.itemsize]
    assert not found[weight.shape[0] - 1].any()  # the label that no image has


def test_first_and_second_derivatives_are_those_of_finite_differences():
    labels, weight, _ = rows()
    labels = labels[:5]

    def squares(weight: Tensor) -> Tensor:
        return embed(labels, weight).square()

    assert torch.autograd.gradcheck(squares, (weight,))
    assert torch.autograd.gradgradcheck(squares, (weight,))


def test_forward_mode_and_vmap_are_torchs():
    labels, weight, _ = rows()
    move = torch.randn(weight.shape, dtype=torch.float64)
    with_ours, with_torchs = (
        torch.func.jvp(lambda w, f=f: f(labels, w).sin(), (weight.detach(),), (move,))
        for f in (embed, nn.functional.embedding)
    )
    assert all(map(torch.equal, with_ours, with_torchs))
    found = torch.func.vmap(lambda label: embed(label, weight.detach()))(labels)
    assert torch.equal(found, weight.detach()[labels])


def test_autocast_rounds_no_gradient():
    given = rows(torch.float32)
    plain = gradient(embed, *given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(embed, *given), plain)


def test_the_module_is_an_embedding_of_torch_by_name_and_by_keys():
    labels, weight, grad = rows(torch.float32)
    ours, theirs = Embedding(7, 12), nn.Embedding(7, 12)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.Embedding) and torch.equal(ours(labels), theirs(labels))
    named = functional_call(ours, {"weight": weight}, (labels,))
    assert torch.equal(named, weight[labels])
    normed = spectral_norm(ours)
    normed(labels).backward(grad)
    assert normed.parametrizations.weight.original.grad.abs().sum() > 0


def graph_of_backward(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    given = rows(torch.float32)
    return make_fx(lambda *given: gradient(function, *given))(*given).code


def test_the_backward_pass_has_no_unordered_sum():
    assert re.search("|".join(UNORDERED), graph_of_backward(nn.functional.embedding))
    assert not re.search("|".join(UNORDERED), graph_of_backward(embed))


@pytest.mark.slow
def test_the_compiler_leaves_it_so():
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, str]:
        torch._dynamo.reset()
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        # On a CPU threads add at once only where there are several.
        with config.patch({"force_disable_caches": True, "cpp.threads": 2}):
            found, code = run_and_get_code(lambda: gradient(fast, *rows(torch.float32)))
        return found, "\n".join(code)

    unordered = "|".join(("atomic_add", *UNORDERED))
    ours, code = run(embed)
    theirs, theirs_code = run(nn.functional.embedding)
    assert re.search(unordered, theirs_code)
    assert not re.search(unordered, code)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours, gradient(embed, *rows(torch.float32)))
