"""Runs whose steps are recorded, held against runs whose steps are not."""

from __future__ import annotations

from pathlib import Path

from small_loop import Folder, left_by

from dgm.training.trainer import Trainer


def train_and_count(trainer: Trainer) -> dict[str, bool]:
    """Train; return for each kind of step (phase and variant) whether it was recorded at last."""
    assert trainer.train(Folder(trainer.job.folder)), "nothing asks it to stop"
    kinds = {} if trainer.graphs is None else trainer.graphs.steps
    return {str(kind): step.replay is not None for kind, step in kinds.items()}


def differences(one: Path, other: Path) -> dict[str, float]:
    """Return the largest absolute difference of what two runs left, by its kind.

    `weights`, `moments`, `average` are of the last checkpoint, `log` of all lines; 0 is bitwise.
    """
    (first, lines), (second, others) = left_by(one), left_by(other)
    kinds = {
        "weights": (first.full.model, second.full.model),
        "moments": (first.full.optimizer, second.full.optimizer),
        "average": (first.ema, second.ema),
    }
    found = {}
    for kind, (a, b) in kinds.items():
        assert a.keys() == b.keys(), kind
        found[kind] = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    pairs = list(zip(lines, others, strict=True))
    assert all(line.keys() == there.keys() for line, there in pairs)
    found["log"] = max(abs(line[key] - there[key]) for line, there in pairs for key in line)
    return found
