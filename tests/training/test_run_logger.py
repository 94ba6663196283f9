"""Trackers that refuse to start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker

from dgm.common.errors import UserError
from dgm.training.engine import Engine
from dgm.training.run_logger import check_trackers, start_trackers


class NotLoggedInError(Exception):
    """An error of the service's own class."""


class Refusing(GeneralTracker):
    """A tracker of a service that refuses every user."""

    name = "wandb"
    requires_logging_directory = False

    def start(self) -> None:
        raise NotLoggedInError("No API key configured.\n  Use `wandb login` to log in.")

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None: ...

    def log(self, values: dict, step: int | None = None, **more: object) -> None: ...


@pytest.fixture
def closed_engine() -> Iterator[Engine]:
    with contextlib.closing(Engine("no")) as engine:
        yield engine
        assert not engine.accelerator.trackers  # so that closing has nothing to finish


def test_a_tracker_that_refuses_is_named_with_its_reason(
    closed_engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        start_trackers(closed_engine, ["tensorboard", Refusing()], tmp_path, {}, 0)
    assert str(caught.value) == (
        "run.trackers names wandb, which did not start (No API key configured): log in by "
        "`wandb login`, set WANDB_MODE=offline, or leave it out"
    )


def test_a_disk_fault_is_not_reported_as_a_trackers(closed_engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        start_trackers(closed_engine, ["tensorboard", Refusing()], tmp_path / "file", {}, 0)


def test_an_unknown_tracker_is_named() -> None:
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"run\.trackers names crayon, .*: install it or choose"):
        check_trackers(["tensorboard", "crayon"])
