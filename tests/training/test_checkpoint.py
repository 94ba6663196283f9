"""Checkpoints are written atomically, and damage is always detected.

tests/test_damaged_runs.py tests random damage to the files.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm import tensor_files
from dgm.common.errors import UserError
from dgm.training import checkpoint
from dgm.training.checkpoint import Checkpoint

FILES = [
    "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
]  # fmt: skip


def made(value: float = 1.0) -> Checkpoint:
    """Return a checkpoint with tensors of several types and memory layouts."""
    wide = torch.full((4, 3, 2, 2), value)
    model = {
        "net.weight": wide.to(memory_format=torch.channels_last),
        "net.half": torch.tensor([value, -0.0, float("inf"), float("nan")], dtype=torch.bfloat16),
        "net.count": torch.tensor(7),
        "net.empty": torch.zeros(0, 3),
        "net.exact": torch.tensor([value / 3], dtype=torch.float64),
        "net.transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    optimizer = {"net.exp_avg.weight": wide / 7, "net.step.weight": torch.tensor(3.0)}
    state = {"images_seen": 100, "wall_s": 0.1 + 0.2, "meter": {"names": [], "sums": [[1 / 3]]}}
    return Checkpoint(model, optimizer, {"net.weight": wide + 1}, state)


def write(folder: Path, images_seen: int, keep: int = 3) -> Path:
    return checkpoint.write(folder, images_seen, made(), keep)


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """Return dtype, shape and bytes, which compare NaN as equal."""
    flat = {k: v.contiguous().flatten().view(torch.uint8).numpy() for k, v in tensors.items()}
    return {k: (v.dtype, v.shape, flat[k].tobytes()) for k, v in tensors.items()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # of the manifest more than its newline


def test_a_checkpoint_is_read_back_bit_by_bit(tmp_path: Path):
    before = made()
    path = checkpoint.write(tmp_path, 100, before, keep=3)
    assert path == checkpoint.newest(tmp_path) == tmp_path / "000000100"
    assert names(tmp_path) == ["000000100"] and names(path) == FILES
    after = checkpoint.read(path)
    assert bits(after.model) == bits(before.model)
    assert bits(after.optimizer) == bits(before.optimizer)
    assert bits(after.ema) == bits(before.ema)
    assert after.state == before.state
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted([*files, "manifest.json"]) == FILES
    for name, entry in files.items():
        assert entry["size"] == (path / name).stat().st_size and len(entry["sha256"]) == 64


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_one_of_its_files_is_skipped(tmp_path: Path, name: str):
    old, new = write(tmp_path, 100), write(tmp_path, 200)
    assert checkpoint.newest(tmp_path) == new
    (new / name).unlink()
    with pytest.warns(UserWarning, match="000000200 is skipped: ") as caught:
        assert checkpoint.newest(tmp_path) == old
    assert len(caught) == 1
    assert names(tmp_path) == ["000000100", "000000200"]


def test_a_run_with_damaged_checkpoints_only_does_not_start_from_scratch(tmp_path: Path):
    for seen in (100, 200):
        truncate(write(tmp_path, seen) / "model.safetensors")
    for _ in range(2):  # nothing is moved away, so the second start reports the same
        with pytest.warns(UserWarning, match="is skipped") as caught:
            with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact: res"):
                checkpoint.take_over(tmp_path)
        assert len(caught) == 2
        assert names(tmp_path) == ["000000100", "000000200"]


def test_an_old_checkpoint_is_renamed_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, 100, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # killed before it
    write(tmp_path, 200, keep=1)
    assert names(tmp_path) == [".partial-000000100", "000000200"]


def test_without_a_folder_there_is_no_checkpoint_and_no_warning(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path / "missing") is None
        assert checkpoint.newest(tmp_path) is None
        checkpoint.remove_partial(tmp_path / "missing")


def test_a_run_on_an_unmounted_disk_does_not_start_from_scratch(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="checkpoints is neither a folder nor a link to one"):
        checkpoint.take_over(folder)
    folder.unlink()
    folder.touch()
    with pytest.raises(UserError, match="mount its disk or restore it"):
        checkpoint.take_over(folder)


def test_a_newer_damaged_checkpoint_is_renamed(tmp_path: Path):
    write(tmp_path, 100)
    for _ in range(2):  # the second time the new name exists already
        truncate(write(tmp_path, 200) / "state.json")
        with pytest.warns(UserWarning, match="000000200 is skipped"):
            assert checkpoint.take_over(tmp_path) == tmp_path / "000000100"
        assert names(tmp_path) == ["000000100", "damaged-000000200"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path) == tmp_path / "000000100"


@pytest.mark.parametrize("failing", ["rename", "save_file", "write_text", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
):
    old = write(tmp_path, 100, keep=1)

    def fail(*_: object, **__: object) -> None:
        raise error

    owner: Any = {"save_file": tensor_files, "write_text": Path}.get(failing, os)
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        with pytest.raises(type(error)):
            write(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["000000100"]
    assert checkpoint.newest(tmp_path) == old
    assert write(tmp_path, 200, keep=1) == checkpoint.newest(tmp_path)


def test_files_are_synced_before_the_folder_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(one: Path, other: Path) -> None:
        order.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write(tmp_path, 100)
    assert {*FILES, ".partial-000000100"} <= set(order[: order.index("rename")])
    assert order[-1] == tmp_path.name


def test_the_partial_checkpoint_of_a_killed_save_is_removed(tmp_path: Path):
    path = write(tmp_path, 100)
    os.rename(write(tmp_path, 200), tmp_path / ".partial-000000200")
    assert checkpoint.newest(tmp_path) == path
    write(tmp_path, 200)  # replaces the partial one
    os.rename(tmp_path / "000000200", tmp_path / ".partial-000000200")
    checkpoint.remove_partial(tmp_path)
    assert names(tmp_path) == ["000000100"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int):
    seen = [5, 900, 10_000, 999_999_999, 1_000_000_000]  # the last has one digit more
    for count in seen:
        write(tmp_path, count, keep)
    assert sorted(map(int, names(tmp_path))) == seen[-keep:]
    assert checkpoint.newest(tmp_path) == tmp_path / "1000000000"
