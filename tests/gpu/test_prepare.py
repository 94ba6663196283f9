"""The folder for a GPU machine: complete, and small enough."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dgm.common.errors import UserError
from tests.gpu import prepare


def wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """Write a wheel of nothing but its metadata."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    with zipfile.ZipFile(path, "w") as archive:
        text = "\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)])
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"{text}\n\nAbout it.\n")
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> dict[str, Path]:
    """Write wheels without requirements for all names in wheels.txt."""
    versions = prepare.read_list(prepare.HERE / "wheels.txt")
    assert all(version is not None for version in versions.values())
    return {name: wheel(tmp_path, name.replace("-", "_"), str(v)) for name, v in versions.items()}


def test_what_the_project_needs_is_on_the_machine_or_among_the_wheels(wheels: dict[str, Path]):
    prepare.check_complete(wheels.values())
    names = {prepare.canonicalize_name(one.name) for one in prepare.project_requirements()}
    assert {"torch", "jsonargparse", "diffusers", "denoising-diffusion-pytorch"} <= names
    assert not names & {"normflows", "pythae", "deepspeed", "submitit"}
    del wheels["webdataset"]
    with pytest.raises(UserError, match=r"the project needs webdataset.*, which the machine lacks"):
        prepare.check_complete(wheels.values())


@pytest.mark.parametrize(
    "need, message",
    [
        ("nowhere>=2", "needs nowhere>=2, which the machine lacks: add it to wheels.txt"),
        ("numpy<2", "needs numpy<2, but there is numpy 2.5.2: choose other versions"),
        ("webdataset<1", "needs webdataset<1, but there is webdataset 1.0.2: choose other"),
        ('nowhere; python_version < "3.12"', None),
        ('nowhere; sys_platform == "win32"', None),
        ('nowhere; extra == "test"', None),
        ("numpy>=2; python_version >= '3.10'", None),
    ],
)
def test_what_wheels_need_is_looked_up(
    need: str, message: str | None, wheels: dict[str, Path], tmp_path: Path
):
    wheels["other"] = wheel(tmp_path, "other", "1.0", "torch>=2", need)
    if message is None:
        prepare.check_complete(wheels.values())
        return
    with pytest.raises(UserError) as caught:
        prepare.check_complete(wheels.values())
    assert str(caught.value).startswith(f"other-1.0-py3-none-any.whl {message}")


def test_what_extras_of_the_project_need_is_looked_up(wheels: dict[str, Path], tmp_path: Path):
    version = str(prepare.read_list(prepare.HERE / "wheels.txt")["jsonargparse"])
    wheel(tmp_path, "jsonargparse", version, 'nowhere; extra == "signatures"')
    with pytest.raises(UserError, match=r"jsonargparse.*with signatures needs nowhere"):
        prepare.check_complete(wheels.values())


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(prepare.MAX_BYTES + 2**20)
    with pytest.raises(UserError, match=r"holds 65.0 MiB, more than 64: leave something out"):
        prepare.check_size(tmp_path)


def archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def test_archives_without_pictures_are_refused(tmp_path: Path):
    prepare.check_images(archive(tmp_path / "good.tar.gz", "a/train/cat/1.JPG"))
    with pytest.raises(UserError, match="which holds no train/CLASS"):
        prepare.check_images(archive(tmp_path / "none.tar.gz", "test/cat/1.jpg", "train/1.jpg"))
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(UserError, match="no archive that can be read"):
        prepare.check_images(tmp_path / "text")
    with pytest.raises(UserError, match="No such file"):
        prepare.check_images(tmp_path / "nowhere")


def test_another_interpreter_is_refused(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.12 3.5.0\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"with Python and Triton 3.12 3.5.0: name one with 3.12"):
        prepare.check_python(str(python))
    with pytest.raises(UserError, match="No such file"):
        prepare.check_python(str(tmp_path / "nowhere"))


COMPILES = """#!/bin/sh
[ "$(basename "$1") $2" = "compile_for_gpu.py 90" ] || exit 1
mkdir -p "$TRITON_CACHE_DIR/key" && echo machine code > "$TRITON_CACHE_DIR/key/norm.cubin"
"""


def test_kernels_are_compiled_ahead_into_one_file(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(COMPILES)
    python.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    prepare.fill_cache(out, str(python))
    assert [path.name for path in out.iterdir()] == ["triton.tar.gz"]
    with tarfile.open(out / "triton.tar.gz") as tar:
        assert "key/norm.cubin" in tar.getnames()
    python.write_text("#!/bin/sh\necho no such module\nexit 1\n")
    with pytest.raises(UserError, match="could not be compiled ahead of time: ended with code 1"):
        prepare.fill_cache(out, str(python))
    assert not list(out.iterdir())  # what was there belonged to another commit
    prepare.fill_cache(out, None)
    assert not list(out.iterdir())


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path):
    words = [sys.executable, prepare.__file__, "--out", tmp_path / "new", "--cifar", "nowhere"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --cifar is nowhere: ")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
