"""Draws: the generator's published answers, their distribution, and that they are functions."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgm import rng
from dgm.diffusion.unet import UNet, UNetBlock, UNetConfig
from dgm.rng import (
    Draws,
    Lanes,
    permutation,
    permutation_block,
    philox,
    purpose_id,
    to_normal_pair,
    to_uniform,
)

ROOT = Path(__file__).resolve().parents[1]

# counter, key, result: the three vectors in kat_vectors of Random123, the authors' own library.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip

indices = st.integers(0, 2**32 - 1)


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


def lanes(draws: Draws, purpose: str, count: int) -> Tensor:
    return torch.stack(draws.bits(purpose, count))


def kolmogorov_smirnov(values: Tensor, cumulative: Tensor) -> float:
    """Return sqrt(n) times the largest gap between the empirical and the true distribution."""
    n = values.numel()
    empirical = torch.arange(1, n + 1, dtype=torch.float64) / n
    gap = torch.maximum((empirical - cumulative).abs(), (empirical - 1 / n - cumulative).abs())
    return float(gap.max()) * math.sqrt(n)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str):
    k0, k1 = words(key)
    assert philox(words(counter), (k0, k1)) == words(answer)


@pytest.mark.slow
def test_compiled_draws_equal_eager_ones():
    def draw(draws: Draws, counter: Lanes, key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (
            *philox(counter, key),
            draws.integers("timestep", 1000),
            draws.keep_mask("dropout", (3, 5), 0.1),
            draws.normal("noise", (7,), torch.float64),
        )

    counters = [words(counter) for counter, _, _ in KNOWN_ANSWERS]
    keys = [words(key) for _, key, _ in KNOWN_ANSWERS]
    c0, c1, c2, c3 = (torch.cat(lane) for lane in zip(*counters, strict=True))
    k0, k1 = (torch.cat(lane) for lane in zip(*keys, strict=True))
    draws = Draws.of(2**40 + 7, torch.tensor([0, 5, 49_999, 2**32 - 1]), torch.tensor([0, 1, 2, 3]))
    given = draws, (c0, c1, c2, c3), (k0, k1)
    *compiled, compiled_normal = torch.compile(draw, fullgraph=True)(*given)
    *eager, normal = draw(*given)
    answers = [torch.cat(lane) for lane in zip(*(words(a) for *_, a in KNOWN_ANSWERS), strict=True)]
    for one, other, name in zip(compiled, eager, "0123im", strict=True):
        assert torch.equal(one, other), name
    for one, answer in zip(compiled[:4], answers, strict=True):
        assert torch.equal(one, answer)
    # Logarithm and sine of compiled code differ by some units in the last place of float64.
    torch.testing.assert_close(compiled_normal, normal, rtol=0, atol=1e-13)


def test_uniform_numbers_are_uniform():
    values = Draws.of(3, torch.arange(256)).uniform("noise", (16, 16), torch.float64).flatten()
    assert values.min() >= 0 and values.max() < 1
    # 1.95 is exceeded once in 1000 by numbers that are uniform.
    ordered = values.sort().values
    assert kolmogorov_smirnov(ordered, ordered) < 1.95


def test_uniform_numbers_stay_below_one_in_float32():
    largest = to_uniform(torch.tensor([0, 2**32 - 1]))
    assert largest.dtype == torch.float32
    assert largest.tolist() == [0.0, 1 - 2.0**-24]


def test_normal_numbers_are_normal():
    values = Draws.of(3, torch.arange(256)).normal("noise", (16, 16), torch.float64).flatten()
    ordered = values.sort().values
    assert kolmogorov_smirnov(ordered, torch.special.ndtr(ordered)) < 1.95  # once in 1000
    # Standard errors of the first four moments are 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n.
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float((values**power).mean()) - expected
        assert abs(error) < 4 * math.sqrt(spread / values.numel()), power


def test_normal_numbers_are_finite_at_the_ends_of_the_generator():
    ends = torch.tensor([0, 255, 2**31, 2**32 - 1])
    for a, b in itertools.product(ends, ends):
        for dtype in (torch.float32, torch.float64):
            for value in to_normal_pair(a, b, dtype):
                assert abs(float(value)) <= 5.78


def test_float32_normals_are_the_float64_ones_rounded():
    draws = Draws.of(1, torch.arange(64))
    single = draws.normal("noise", (33, 33))
    assert single.dtype == torch.float32
    # float32 rounds the angle, up to 2 pi, by 2.4e-7; the radius, up to 5.77, multiplies that.
    torch.testing.assert_close(
        single.double(), draws.normal("noise", (33, 33), torch.float64), rtol=0, atol=3e-6
    )


@pytest.mark.parametrize("high", [2, 10, 1000])
def test_integers_are_spread_evenly(high: int):
    drawn = Draws.of(5, torch.arange(200_000)).integers("timestep", high)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=high).double()
    assert len(counts) == high
    expected = 200_000 / high
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Mean high - 1, variance 2 (high - 1); four standard deviations.
    assert abs(chi_square - (high - 1)) < 4 * math.sqrt(2 * (high - 1))


def test_integers_reach_the_largest_bound():
    drawn = Draws.of(5, torch.arange(10_000)).integers("timestep", 2**31)
    assert drawn.min() >= 0 and drawn.max() < 2**31
    assert drawn.max() > 2**31 * 0.999  # fails for about one seed in 20,000


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_keep_mask_drops_the_given_fraction(drop: float):
    mask = Draws.of(2, torch.arange(64)).keep_mask("dropout", (32, 32), drop)
    assert mask.dtype == torch.bool and mask.shape == (64, 32, 32)
    # Four standard errors, and the 2^-17 by which 16 bits round the fraction.
    bound = 4 * math.sqrt(drop * (1 - drop) / mask.numel()) + 2**-17
    assert abs(float((~mask).double().mean()) - drop) < bound


def test_elements_of_keep_mask_are_independent():
    # Eight elements use the four 32-bit numbers of a block, two of each.
    mask = Draws.of(2, torch.arange(20_000)).keep_mask("dropout", (8,), 0.5).double()
    correlations = torch.corrcoef(mask.T).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 4.5 / math.sqrt(20_000)  # once in 150,000 a pair


def test_keep_mask_can_keep_all_or_none():
    draws = Draws.of(2, torch.arange(64))
    assert draws.keep_mask("dropout", (32, 32), 0.0).all()
    assert not draws.keep_mask("dropout", (32, 32), 1.0).any()


@given(st.lists(indices, min_size=1, max_size=9), st.data())
@settings(max_examples=30, deadline=None)
def test_draws_of_an_image_do_not_depend_on_its_batch(batch: list[int], data: st.DataObject):
    seed, step = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 2**20))
    shape = data.draw(st.sampled_from([(), (1,), (3,), (2, 5), (4, 4)]))
    together = Draws.of(seed, torch.tensor(batch), step)
    place = data.draw(st.integers(0, len(batch) - 1))
    alone = Draws.of(seed, torch.tensor([batch[place]]), torch.tensor([step]))
    assert torch.equal(lanes(together, "noise", 9)[:, place], lanes(alone, "noise", 9)[:, 0])
    # uniform and keep_mask only shift and scale; the vector width may change a logarithm's last bit
    assert torch.equal(together.uniform("noise", shape)[place], alone.uniform("noise", shape)[0])
    masks = (draws.keep_mask("dropout", shape, 0.3) for draws in (together, alone))
    assert torch.equal(next(masks)[place], next(masks)[0])
    torch.testing.assert_close(
        together.normal("noise", shape)[place], alone.normal("noise", shape)[0], rtol=0, atol=3e-6
    )


@given(st.lists(st.integers(1, 5), max_size=3))
@settings(max_examples=30, deadline=None)
def test_every_shape_is_filled_with_different_numbers(sizes: list[int]):
    shape = tuple(sizes)
    draws = Draws.of(0, torch.tensor([4, 9]))
    drawn = draws.uniform("noise", shape, torch.float64)
    assert drawn.shape == (2, *shape)
    # Two of at most 250 numbers out of 2^24 are equal once in 500 seeds; seed 0 has none.
    assert drawn.unique().numel() == drawn.numel()
    assert draws.normal("noise", shape).shape == (2, *shape)
    assert draws.keep_mask("noise", shape, 0.5).shape == (2, *shape)


def test_images_draw_distinct_numbers_and_a_step_may_be_a_tensor():
    draws = Draws.of(0, torch.arange(100), 7)
    base = lanes(draws, "noise", 4)
    assert base.unique().numel() == base.numel()
    assert torch.equal(base, lanes(draws.at(torch.full((100,), 7)), "noise", 4))


def test_neighboring_draws_are_not_correlated():
    # 65,536 normals each for neighboring images, steps, purposes and seeds, for neighbors within
    # an image, and for squares, which would show a shared radius.
    draws = Draws.of(0, torch.arange(256), 3)

    def normal(draws: Draws, purpose: str = "noise") -> Tensor:
        return draws.normal(purpose, (256,), torch.float64)

    base = normal(draws)
    pairs = {
        "image": (base, normal(Draws.of(0, torch.arange(1, 257), 3))),
        "step": (base, normal(draws.at(4))),
        "purpose": (base, normal(draws, "latent")),
        "seed": (base, normal(Draws.of(1, torch.arange(256), 3))),
        "upper half of the seed": (base, normal(Draws.of(2**32, torch.arange(256), 3))),
        "pixel": (base[:, :-1], base[:, 1:]),
        "cosine and sine": (base[:, :64], base[:, 64:128]),
        "blocks": (base[:, :128], base[:, 128:]),
    }
    for name, (one, other) in pairs.items():
        for power in (1, 2):
            both = torch.stack([(one**power).flatten(), (other**power).flatten()])
            correlation = float(torch.corrcoef(both)[0, 1])
            # 4.5 standard errors: once in 150,000 for each of the 16 numbers.
            assert abs(correlation) < 4.5 / math.sqrt(both.shape[1]), (name, power)


def purposes_in_source() -> set[str]:
    """Collect the purposes in the library: strings passed to functions that draw."""
    drawing = {"bits", "uniform", "normal", "integers", "keep_mask"}
    drawing |= {"counter_dropout", "_noise_like", "noise"}
    found = set()
    for path in (ROOT / "dgm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            if name in drawing:
                found |= {
                    argument.value
                    for argument in node.args
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                }
    return found


def test_purposes_have_distinct_numbers():
    purposes = purposes_in_source()
    assert {"noise", "timestep", "order", "ancestral"} <= purposes
    config = UNetConfig(
        channels=4, channel_mult=[1] * 4, num_blocks=[8] * 4, attention_at=[], skips="concat"
    )
    net = UNet(config, 8)
    blocks = [m.purpose for m in net.modules() if isinstance(m, UNetBlock)]
    assert len(blocks) == 8 * 4 + 9 * 4 + 2
    assert len(set(blocks)) == len(blocks)
    names = sorted(purposes) + blocks
    assert len({purpose_id(name) for name in names}) == len(names)
    assert all(0 <= purpose_id(name) < 2**32 for name in names)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_each_image_once(length: int, seed: int, epoch: int):
    order = permutation(seed, epoch, length)
    assert torch.equal(order.sort().values, torch.arange(length))
    assert torch.equal(order, permutation(seed, epoch, length))


@pytest.mark.slow
@given(st.integers(17, 1000), st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_permutation_block_by_block_holds_each_image_once(length: int, seed: int, epoch: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "PERMUTATION_BLOCK", 16)
        blocks = [
            permutation_block(seed, epoch, length, block) for block in range(-(-length // 16))
        ]
        assert [len(block) for block in blocks[:-1]] == [16] * (len(blocks) - 1)
        assert torch.equal(torch.cat(blocks).sort().values, torch.arange(length))
        assert torch.equal(torch.cat(blocks), permutation(seed, epoch, length))


def test_a_large_permutation_looks_random():
    length, cells = 100_000, 32
    orders = [permutation(seed, epoch, length) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    positions = torch.arange(length)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() <= 8
    for images in orders:
        assert torch.equal(images.sort().values, positions)
        for before, after in ((positions, images), (images[:-1], images[1:])):
            # Where an image lies and what comes next: 1,024 cells, 961 degrees of freedom.
            cell = before * cells // length * cells + after * cells // length
            counts = torch.bincount(cell, minlength=cells**2).double()
            mean = len(after) / cells**2
            assert abs(float(((counts - mean) ** 2 / mean).sum()) - 961) < 4 * math.sqrt(2 * 961)


@pytest.mark.parametrize("seed, epoch", [(0, 1), (1, 0), (2**32, 0), (0, 1000)])
def test_permutation_differs_for_each_epoch_and_seed(seed: int, epoch: int):
    # Two random orders agree at one position on average (Poisson); more than 8 once in a million.
    assert (permutation(0, 0, 1000) == permutation(seed, epoch, 1000)).sum() <= 8


def test_permutation_is_uniform_over_positions():
    firsts = torch.stack([permutation(0, epoch, 8) for epoch in range(1000)])
    counts = torch.stack([torch.bincount(place, minlength=8) for place in firsts.T]).double()
    # 64 cells of 125: a chi-square of 49 degrees of freedom; four standard deviations.
    assert abs(float(((counts - 125) ** 2 / 125).sum()) - 49) < 4 * math.sqrt(2 * 49)
