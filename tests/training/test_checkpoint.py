"""Checkpoints are written atomically, and damage is always noticed."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm import tensor_files
from dgm.common.errors import UserError
from dgm.training import checkpoint
from dgm.training.checkpoint import Checkpoint, FullState

FILES = (
    "ema.safetensors",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
)


def made(value: float = 1.0) -> Checkpoint:
    wide = torch.full((4, 3, 2, 2), value)
    model = {
        "net.weight": wide.to(memory_format=torch.channels_last),
        "net.half": torch.tensor([value, -0.0, float("inf"), float("nan")], dtype=torch.bfloat16),
        "net.count": torch.tensor(7),
        "net.empty": torch.zeros(0, 3),
        "net.exact": torch.tensor([value / 3], dtype=torch.float64),
        "net.turned": torch.arange(6.0).reshape(2, 3).T,
    }
    optimizer = {
        "net.exp_avg.weight": torch.randn(4, 3, 2, 2),
        "net.step.weight": torch.tensor(3.0),
    }
    state = {"images_seen": 100, "wall_s": 0.1 + 0.2, "meter": {"names": [], "sums": [[1 / 3]]}}
    return Checkpoint(FullState(model, optimizer), {"net.weight": wide + 1}, state)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (one[k].dtype, one[k].shape, bits(one[k]))
        == (other[k].dtype, other[k].shape, bits(other[k]))
        for k in one
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # of the manifest more than its newline


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def test_what_is_written_is_read_bit_by_bit(tmp_path: Path):
    before = made()
    path = checkpoint.write(tmp_path, 100, before, keep=3)
    assert path == tmp_path / "000000100"
    assert names(tmp_path) == ["000000100"] and names(path) == list(FILES)
    assert checkpoint.newest(tmp_path) == path
    after = checkpoint.read(path)
    assert same(after.full.model, before.full.model)
    assert same(after.full.optimizer, before.full.optimizer)
    assert same(after.ema, before.ema)
    assert after.state == before.state


def test_the_manifest_names_size_and_checksum_of_every_other_file(tmp_path: Path):
    path = checkpoint.write(tmp_path, 100, made(), keep=3)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted([*files, "manifest.json"]) == list(FILES)
    for name, entry in files.items():
        assert entry["size"] == (path / name).stat().st_size
        assert len(entry["sha256"]) == 64


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, cut_to_nothing, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], Any]
):
    old = checkpoint.write(tmp_path, 100, made(), keep=3)
    new = checkpoint.write(tmp_path, 200, made(2.0), keep=3)
    assert checkpoint.newest(tmp_path) == new
    damage(new / name)
    with pytest.warns(UserWarning, match="000000200 is skipped: ") as caught:
        assert checkpoint.newest(tmp_path) == old
    assert len(caught) == 1
    assert names(tmp_path) == ["000000100", "000000200"]


def test_any_flipped_byte_of_the_manifest_is_noticed(tmp_path: Path):
    manifest = checkpoint.write(tmp_path, 100, made(), keep=3) / "manifest.json"
    whole = manifest.read_bytes()
    for k in range(len(whole)):
        manifest.write_bytes(whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :])
        assert checkpoint.find_fault(manifest.parent) is not None, k
    manifest.write_bytes(whole)
    assert checkpoint.find_fault(manifest.parent) is None


def test_a_run_without_a_whole_checkpoint_does_not_start_from_scratch(tmp_path: Path):
    for seen in (100, 200):
        cut_short(checkpoint.write(tmp_path, seen, made(), keep=3) / "model.safetensors")
    for _ in range(2):  # nothing is moved away either, so the second start reports the same
        with pytest.warns(UserWarning, match="is skipped") as caught:
            with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is whole: res"):
                checkpoint.take_over(tmp_path)
        assert len(caught) == 2
        assert names(tmp_path) == ["000000100", "000000200"]


def test_an_old_one_that_is_half_removed_has_no_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint.write(tmp_path, 100, made(), keep=1)
    removed: list[str] = []

    def remove(path: Path, ignore_errors: bool = False) -> None:
        removed.append(path.name)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)  # as if killed before it did
    checkpoint.write(tmp_path, 200, made(), keep=1)
    assert names(tmp_path) == [".partial-000000100", "000000200"]
    assert removed == [".partial-000000200", ".partial-000000100"]


def test_no_folder_means_none_without_a_warning(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path / "missing") is None
        assert checkpoint.newest(tmp_path) is None
        checkpoint.remove_partial(tmp_path / "missing")


def test_checkpoints_on_an_unmounted_disk_are_not_started_from_scratch(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="checkpoints is no folder, nor a link to an existing one"):
        checkpoint.take_over(folder)
    folder.unlink()
    folder.touch()
    with pytest.raises(UserError, match="mount its disk or restore it"):
        checkpoint.take_over(folder)


def test_a_damaged_one_set_aside_leaves_its_name_free(tmp_path: Path):
    checkpoint.write(tmp_path, 100, made(), keep=3)
    for _ in range(2):  # the second time over what was set aside before
        cut_short(checkpoint.write(tmp_path, 200, made(), keep=3) / "state.json")
        with pytest.warns(UserWarning, match="000000200 is skipped"):
            assert checkpoint.take_over(tmp_path) == tmp_path / "000000100"
        assert names(tmp_path) == ["000000100", "damaged-000000200"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path) == tmp_path / "000000100"


@pytest.mark.parametrize("failing", ["rename", "save_file", "write_text", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
):
    old = checkpoint.write(tmp_path, 100, made(), keep=1)

    def fail(*_: object, **__: object) -> None:
        raise error

    owner: Any = {"save_file": tensor_files, "write_text": Path}.get(failing, os)
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        with pytest.raises(type(error)):
            checkpoint.write(tmp_path, 200, made(), keep=1)
    assert names(tmp_path) == ["000000100"]
    assert checkpoint.newest(tmp_path) == old
    assert checkpoint.write(tmp_path, 200, made(), keep=1) == checkpoint.newest(tmp_path)


def test_files_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    checkpoint.write(tmp_path, 100, made(), keep=3)
    before = order[: order.index("rename")]
    assert set(FILES) <= set(before) and ".partial-000000100" in before
    assert order[-1] == tmp_path.name


def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(tmp_path: Path):
    path = checkpoint.write(tmp_path, 100, made(), keep=3)
    os.rename(checkpoint.write(tmp_path, 200, made(), keep=3), tmp_path / ".partial-000000200")
    assert checkpoint.newest(tmp_path) == path
    checkpoint.write(tmp_path, 200, made(), keep=3)  # over the leftover
    os.rename(tmp_path / "000000200", tmp_path / ".partial-000000200")
    checkpoint.remove_partial(tmp_path)
    assert names(tmp_path) == ["000000100"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int):
    seen = [5, 900, 10_000, 999_999_999, 1_000_000_000]  # the last has a digit more
    for count in seen:
        checkpoint.write(tmp_path, count, made(), keep)
    assert sorted(int(name) for name in names(tmp_path)) == seen[-keep:]
    assert checkpoint.newest(tmp_path) == tmp_path / "1000000000"
