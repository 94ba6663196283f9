"""The engine of one process: full states, frozen nets, errors of the first process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.training import checkpoint
from dgm.training.checkpoint import Checkpoint
from dgm.training.engine import Engine
from dgm.training.optimizer import OptimConfig
from dgm.training.state_dicts import load_nets, tensors_of

OPTIM = OptimConfig(lr=0.1, weight_decay=0.01, clip_norm=1.0)


def copy_of(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tensors_of(nets).items()}


def learn(engine: Engine, steps: int, seed: int) -> None:
    """Train some steps on random inputs of this seed."""
    torch.manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6)
        with engine.freeze_others("other") as nets:
            wrapped = engine.wrapped_nets["other"]
            loss = wrapped.forward(lambda x=x, nets=nets: nets["other"](x).exp().mean(), sync=True)
            wrapped.backward(loss)
        wrapped.clip_and_step(0.05, lambda norm: None)


def test_a_loaded_state_continues_to_the_same_bits(
    engine: Engine, nets: dict[str, nn.Module], tmp_path: Path
):
    fresh = copy.deepcopy(nets)
    engine.prepare(nets, dict.fromkeys(nets, OPTIM))
    learn(engine, 3, seed=1)
    weights, moments = engine.full_state()
    assert {key.split(".")[1] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}
    path = checkpoint.write(tmp_path, 3, Checkpoint(weights, moments, {}, {}), keep=1)
    learn(engine, 3, seed=2)
    expected = copy_of(engine.copy_nets())

    other = Engine("no")
    other.prepare(fresh, dict.fromkeys(fresh, OPTIM))
    saved = checkpoint.read(path)
    other.load_full_state(saved.model, saved.optimizer)
    learn(other, 3, seed=2)
    for key, value in copy_of(other.copy_nets()).items():
        assert torch.equal(value, expected[key]), key


def test_only_the_net_of_a_phase_is_updated(engine: Engine, nets: dict[str, nn.Module]):
    nets["net"].bias.requires_grad_(False)  # must be frozen afterwards too
    engine.prepare(nets, dict.fromkeys(nets, OPTIM))
    before = copy_of(nets)
    with pytest.raises(RuntimeError, match="in the phase"), engine.freeze_others("other") as inside:
        assert set(inside) == set(nets)
        assert not any(p.requires_grad for p in inside["net"].parameters())
        assert all(p.requires_grad for p in inside["other"].parameters())
        raise RuntimeError("in the phase")
    assert nets["net"].weight.requires_grad and not nets["net"].bias.requires_grad
    learn(engine, 1, seed=0)
    after = copy_of(nets)
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"other"}


@pytest.mark.parametrize("clip_norm, expected", [(0.5, 0.5), (0.0, 5.0), (10.0, 5.0)])
def test_the_gradient_is_clipped_and_its_previous_norm_is_checked(
    engine: Engine, nets: dict[str, nn.Module], clip_norm: float, expected: float
):
    engine.prepare(nets, dict.fromkeys(nets, replace(OPTIM, clip_norm=clip_norm)))
    nets["net"].weight.grad = torch.tensor([[3.0, 0, 0], [4.0, 0, 0]])
    seen: list[float] = []

    def see(norm: Tensor) -> None:
        seen.append(float(norm))
        assert float(nets["net"].weight.grad.norm()) == pytest.approx(expected, rel=1e-5)  # float32

    engine.wrapped_nets["net"].clip_and_step(0.1, see)
    assert seen == [pytest.approx(5)]


def test_the_given_learning_rate_is_used(engine: Engine, nets: dict[str, nn.Module]):
    engine.prepare(nets, dict.fromkeys(nets, OPTIM))
    net = nets["net"]
    before = net.weight.detach().clone()
    net.weight.grad = torch.ones_like(before)
    engine.wrapped_nets["net"].clip_and_step(0.0, lambda norm: None)
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
    net.weight.grad = torch.ones_like(before)
    engine.wrapped_nets["net"].clip_and_step(0.25, lambda norm: None)
    # Adam's step is the rate, whatever the gradient; decay 0.01 of it takes 0.0025 of the weight.
    torch.testing.assert_close(net.weight.detach(), before * (1 - 0.0025) - 0.25)


def test_tensors_that_do_not_fit_the_model_are_named(nets: dict[str, nn.Module]):
    before = copy_of(nets)
    missing = {k: v for k, v in before.items() if k != "net.bias"}
    reshaped = {**before, "net.weight": torch.zeros(2, 4)}
    extra = {**before, "net.more": torch.zeros(1)}
    for tensors, name in ((missing, "net.bias"), (reshaped, "net.weight"), (extra, "net.more")):
        with pytest.raises(UserError, match=rf"at {name}: .*model\.\*"):
            load_nets(nets, {k: v + 1 for k, v in tensors.items()})
    with pytest.raises(UserError, match=r"at net\.bias, net\.weight, other\..* and \d+ more"):
        load_nets(nets, {})
    assert all(torch.equal(value, before[key]) for key, value in copy_of(nets).items())
    load_nets(nets, {k: v + 1 for k, v in before.items()})
    assert torch.equal(nets["net"].weight, before["net.weight"] + 1)


def test_moments_that_do_not_fit_the_model_are_named(engine: Engine, nets: dict[str, nn.Module]):
    engine.prepare(nets, dict.fromkeys(nets, OPTIM))
    learn(engine, 1, seed=1)
    weights, moments = engine.full_state()
    assert {"other.step.0.weight", "other.exp_avg.0.weight"} <= moments.keys()
    assert not [key for key in moments if key.startswith("net.")], "it has not learned yet"
    before = copy_of(engine.copy_nets())
    for changed, name in (
        ({k: v for k, v in moments.items() if k != "other.step.0.weight"}, "other.step.0.weight"),
        ({**moments, "other.exp_avg.0.bias": torch.zeros(2)}, "other.exp_avg.0.bias"),
        ({**moments, "net.momentum.weight": torch.zeros(2)}, "net.momentum.weight"),
    ):
        with pytest.raises(UserError, match=rf"does not fit the model at {name}: use"):
            engine.load_full_state({k: v + 1 for k, v in before.items()}, changed)
    assert all(torch.equal(value, before[key]) for key, value in copy_of(nets).items())
    engine.load_full_state(weights, moments)


def test_the_first_process_passes_on_results_and_errors(engine: Engine):
    assert engine.on_main(lambda: {"a": 1}) == {"a": 1}
    assert engine.on_main(lambda: None) is None
    for error in (UserError("choose another"), RuntimeError("a defect")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            engine.on_main(fail)
        assert caught.value is error


def test_convolutions_are_trained_in_channels_last(engine: Engine, nets: dict[str, nn.Module]):
    before = copy_of(nets)
    engine.prepare(nets, dict.fromkeys(nets, OPTIM))
    assert nets["other"][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[key]) for key, value in copy_of(nets).items())


@pytest.mark.parametrize(
    ("count", "processes", "parts"),
    [
        (5, 1, [[0, 1, 2, 3, 4]]),
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4, 4]]),
        (2, 4, [[0], [1], [1], [1]]),
    ],
)
def test_rows_are_split_evenly_and_all_processes_get_the_whole(
    engine: Engine, count: int, processes: int, parts: list[list[int]]
):
    whole = torch.cat([torch.tensor(part) for part in parts])
    engine.world_size, engine.gather = processes, lambda part: whole  # type: ignore[method-assign]
    for engine.rank, part in enumerate(parts):
        found = engine.map_rows(count, lambda rows, part=part: assert_equal(rows, part))
        assert found.tolist() == list(range(count))


def assert_equal(rows: Tensor, expected: list[int]) -> Tensor:
    assert rows.tolist() == expected
    return rows
