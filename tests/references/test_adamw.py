"""AdamW against torch.optim.AdamW: our kernel, torch's fused pass, the moving average, decay.

Source: torch.optim.AdamW of one tensor at a time (`foreach=False, fused=False`), in float64, with
weight decay in a parameter group of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dgm.cli.parser import TRAINERS, family_module, parse
from dgm.nn.kernels import adamw, native
from dgm.training.ddp import DataParallelNet
from dgm.training.ema import Ema
from dgm.training.optimizer import AdamW, OptimConfig, decayed_weights, torch_adamw

STEPS = 100
DECAYED = ("conv.weight", "linear.parametrizations.weight.original", "transposed.weight")
SETTINGS: dict[str, dict[str, Any]] = {
    "decay": {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    "no decay": {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.0},
    # Integers, as YAML gives them for numbers written without a decimal point.
    "whole numbers": {"lr": 1, "betas": (0, 0.99), "eps": 0, "weight_decay": 0},
    "whole decay": {"lr": 1, "betas": (0, 0), "eps": 1, "weight_decay": 1},
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert native.library() is not None, "without a compiler nothing would be tested"


class Net(nn.Module):
    """Weights of every kind that decays and that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 8, 3)
        self.linear = spectral_norm(nn.Linear(5, 4))
        self.transposed = nn.ConvTranspose2d(8, 6, 2)
        self.norm = nn.GroupNorm(2, 8)
        self.embedding = nn.Embedding(3, 4)
        self.log_scale = nn.Parameter(torch.randn(4, 1, 1))


def reference(net: nn.Module, setting: dict[str, Any]) -> torch.optim.Optimizer:
    named = dict(net.named_parameters())
    rest = [p for name, p in named.items() if name not in DECAYED]
    groups = [{"params": [named[name] for name in DECAYED]}, {"params": rest, "weight_decay": 0.0}]
    floats = {**setting, "betas": tuple(map(float, setting["betas"]))}  # torch refuses integers
    return torch.optim.AdamW(groups, **floats, foreach=False, fused=False)


def gradients(net: nn.Module, step: int) -> list[Tensor]:
    torch.manual_seed(step)
    return [torch.randn(p.shape, dtype=torch.float64) for p in net.parameters()]


def set_gradients(net: nn.Module, grads: list[Tensor]) -> None:
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        parameter.grad = grad.to(parameter)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_hundred_steps_match_torch(name: str, kernels: bool):
    setting = SETTINGS[name]
    net = Net()
    exact = copy.deepcopy(net).double()
    theirs, made = reference(exact, setting), DataParallelNet(net, OptimConfig(**setting), kernels)
    assert made.optimizer.native == kernels
    for step in range(STEPS):
        grads = gradients(net, step)
        set_gradients(net, grads)
        set_gradients(exact, grads)
        made.optimizer.step(setting["lr"])
        theirs.step()
    for (key, mine), other in zip(net.named_parameters(), exact.parameters(), strict=True):
        # A hundred roundings, each by 6e-8 of the largest value that a weight may have had.
        largest = float(other.detach().abs().max()) + setting["lr"] * STEPS**0.5
        error = float((mine.detach() - other.detach()).abs().max())
        assert error < 100 * 6e-8 * largest, key


@pytest.mark.parametrize("kernels", [True, False])
def test_zero_gradient_with_eps_zero_gives_nan_as_torch_does(kernels: bool):
    setting = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0, "weight_decay": 0.0}
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(net.state_dict())
    made, theirs = AdamW(net.parameters(), OptimConfig(**setting), kernels), None
    theirs = torch.optim.AdamW(other.parameters(), **setting, foreach=False)
    grad = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    for each in (net, other):
        each.weight.grad, each.bias.grad = grad.clone(), torch.ones(2)
    made.step(0.1)
    theirs.step()
    assert torch.equal(net.weight.isnan(), grad == 0) and not net.bias.isnan().any()
    torch.testing.assert_close(net.weight, other.weight, equal_nan=True)


def test_torch_adamw_decays_one_parameter_group_only():
    net = Net()
    config = OptimConfig(**SETTINGS["decay"])
    decays, rest = torch_adamw(net.parameters(), config, decayed_weights(net)).param_groups
    named = dict(net.named_parameters())
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decays["params"]} == {id(named[name]) for name in DECAYED}
    assert len(decays["params"]) + len(rest["params"]) == len(named)
    bias = nn.BatchNorm2d(3)  # with nothing that decays there is one group
    (alone,) = torch_adamw(bias.parameters(), config, decayed_weights(bias)).param_groups
    assert alone["weight_decay"] == 0


OPTIONS = {
    "diffusion": "--model.attention_at=[16]",
    "dcgan": "--model.architecture=dcgan --gan.r1=0",
}


@pytest.mark.parametrize("name", [*TRAINERS, "dcgan"])
def test_norms_biases_embeddings_and_scales_of_a_family_do_not_decay(name: str):
    family = "gan" if name == "dcgan" else name
    module, default = family_module(family), f"{TRAINERS[family]}_tiny.yaml"
    config = parse(module.Config, default, OPTIONS.get(name, "").split())
    for net in module.make_parts(config, (32, 32, 3), 4).nets.values():
        decays = {id(p) for p in decayed_weights(net)}
        found = {key for key, p in net.named_parameters() if id(p) in decays}
        left = {key for key, p in net.named_parameters()} - found
        assert found and all(key.endswith(("weight", "weight.original")) for key in found)
        words = ("norm", "classes", "label", "embedding", "log_scale", "log_s", "lower", "upper")
        assert not [key for key in found if any(word in key for word in words)]
        # All others have one of these words in their name, or are biases.
        unnamed = [key for key in left if not any(word in key for word in words)]
        assert all("bias" in key.rsplit(".", 1)[-1] for key in unnamed), unnamed


def test_arguments_of_a_kernel_are_checked():
    x = torch.ones(4)
    sizes, norm = torch.tensor([4]), torch.empty(1)
    address = torch.tensor([x.data_ptr()])
    native.call("gradient_norm", 1, sizes, address, norm)
    assert float(norm) == 2
    with pytest.raises(TypeError, match="gradient_norm takes 4 arguments, got 3"):
        native.call("gradient_norm", 1, sizes, address)
    with pytest.raises(TypeError, match="takes 4 arguments, got 5"):
        native.call("gradient_norm", 1, sizes, address, norm, norm)
    wrong: list[tuple[Any, ...]] = [
        (1.0, sizes, address, norm),
        (1, sizes.int(), address, norm),
        (1, sizes, address, norm.double()),
        (1, sizes, None, norm),
        (1, sizes, address, torch.empty(2, 2)[:, 0]),
        (1, sizes, address, 0.0),
    ]
    for arguments in wrong:
        with pytest.raises((TypeError, native.ctypes.ArgumentError)):
            native.call("gradient_norm", *arguments)


def test_tensors_of_another_type_or_layout_are_refused_or_copied():
    weight, config = torch.randn(4, 3), adamw.AdamWConfig(0.1, (0.9, 0.99), 1e-8, 0.0)
    moments = [torch.zeros_like(weight)], [torch.zeros_like(weight)]
    with pytest.raises(RuntimeError, match="must match the size"):
        adamw.adamw_([weight], [torch.ones(2, 2)], *moments, None, [1], config)
    with pytest.raises(TypeError, match="expected tensors of float32"):
        adamw.adamw_([weight], [torch.ones(4, 3).double()], *moments, None, [1], config)
    for kernels in (True, False):
        nets = [nn.Linear(3, 4) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        nets[0].weight.grad = torch.randn(3, 4).T  # of another layout
        nets[1].weight.grad = nets[0].weight.grad.contiguous()
        for net in nets:
            AdamW(net.parameters(), OptimConfig(), kernels).step(0.1)
        assert torch.equal(nets[0].weight, nets[1].weight)


def test_norm_of_no_gradients_is_zero_and_of_views_that_of_their_elements():
    assert float(adamw.gradient_norm([])) == 0
    assert float(adamw.gradient_norm([torch.empty(0)])) == 0
    view = torch.arange(16.0).view(4, 4)[:, 1]
    assert float(adamw.gradient_norm([view])) == pytest.approx(float(view.norm()))
    assert float(adamw.gradient_norm([torch.ones(1).expand(9)])) == 3


EMA = OptimConfig(lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)


def make_net() -> nn.Module:
    """Return weights of one element, of exactly one part of the kernel, and of more."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(40, 50, 3), nn.Linear(128, 128), nn.Linear(1, 1, bias=False)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def set_random_gradients(net: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (step % 3 - 2)


def train_with_average(kernels: bool) -> tuple[dict[str, Tensor], list[bool]]:
    """Take five steps; return weights, moments and averages, and whether averages were fused."""
    net = make_net()
    made, ema = AdamW(net.parameters(), EMA, kernels), Ema({"net": net}, 1000.0)
    fused = []
    for step in range(5):
        set_random_gradients(net, step)
        seen = 16 * (step + 1)
        taken = made.step(EMA.lr / (1 + step), ema=ema.fused_update("net", seen, 16))
        ema.update({"net": net}, seen, 16, {"net": taken})
        fused.append(taken)
    found = {f"weight {name}": value.detach() for name, value in net.named_parameters()}
    found |= {f"average {name}": value for name, value in ema.nets["net"].named_parameters()}
    for name, parameter in net.named_parameters():
        found |= {f"{kind} {name}": value for kind, value in made.state[parameter].items()}
    return found, fused


def test_steps_and_averages_are_torchs_to_rounding():
    (ours, fused), (theirs, separate) = train_with_average(True), train_with_average(False)
    assert fused == [True] * 5 and separate == [False] * 5
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=1e-8, msg=name)


def test_results_do_not_depend_on_the_number_of_threads():
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norm = adamw.gradient_norm([p.detach() for p in make_net().parameters()])
        found.append({"norm": norm, **train_with_average(True)[0]})
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_norm_is_that_of_all_gradients(size: float):
    grads = [p.detach() * size for p in make_net().parameters()]
    expected = torch.cat([g.flatten() for g in grads]).double().norm()
    torch.testing.assert_close(adamw.gradient_norm(grads).double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norm_of_gradients_that_are_not_finite_is_not_finite(value: float):
    grads = [torch.ones(3), torch.full((100,), value)]
    assert not torch.isfinite(adamw.gradient_norm(grads))


@pytest.mark.parametrize("reason", ["a weight has no gradient", "another memory format"])
def test_average_is_updated_separately_where_it_cannot_be_fused(reason: str):
    net = make_net()
    made, ema = AdamW(net.parameters(), EMA, True), Ema({"net": net}, 1000.0)
    set_random_gradients(net, 0)
    if reason == "another memory format":
        ema.nets["net"].to(memory_format=torch.contiguous_format)
    else:
        next(iter(net.parameters())).grad = None
    before = [value.clone() for value in ema.nets["net"].parameters()]
    assert not made.step(0.1, ema=ema.fused_update("net", 16, 16))
    assert all(map(torch.equal, before, ema.nets["net"].parameters()))


def test_double_precision_is_torchs():
    net = make_net().double()
    made = AdamW(net.parameters(), EMA, True)
    set_random_gradients(net, 0)
    assert not made.native and not made.step(0.1)
