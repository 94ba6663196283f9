"""Rows shared among processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dgm.training.engine import Engine


@pytest.mark.parametrize(
    ("count", "processes", "parts"),
    [
        (5, 1, [[0, 1, 2, 3, 4]]),
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4, 4]]),
        (2, 4, [[0], [1], [1], [1]]),
    ],
)
def test_each_process_takes_an_equal_part_and_all_get_the_whole(
    count: int, processes: int, parts: list[list[int]]
):
    asked: list[list[int]] = []

    def work(mine: torch.Tensor) -> torch.Tensor:
        asked.append(mine.tolist())
        return mine[:, None] * torch.tensor([1, 10])

    def gather(part: torch.Tensor) -> torch.Tensor:
        others = [torch.tensor(rows)[:, None] * torch.tensor([1, 10]) for rows in parts]
        assert torch.equal(part, others[len(asked) - 1])
        return torch.cat(others)

    for rank in range(processes):
        engine = SimpleNamespace(
            rank=rank, world_size=processes, gather=gather, device=torch.device("cpu")
        )
        found = Engine.map_rows(engine, count, work)  # type: ignore[arg-type]
        assert found[:, 1].tolist() == [10 * k for k in range(count)]
    assert asked == parts
