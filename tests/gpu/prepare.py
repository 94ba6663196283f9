"""Prepare a session on a GPU machine without a network: `python tests/gpu/prepare.py`.

Run from the root of the repository on a machine with a network; no GPU is needed. Fills .gpu/,
which git ignores, with the wheels that the GPU machine lacks, CIFAR images, the commit's id, and
Triton's cache of our compiled kernels; at most 64 MiB in all. Copy it to the GPU machine with the
code, and run `python tests/gpu/run.py 560` there.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from dgm.benchmarks.processes import ROOT
from dgm.common.command_line import Parser, run_command
from dgm.common.errors import UserError
from tests.gpu.processes import CommandError, run_limited

HERE = ROOT / "tests" / "gpu"
MAX_BYTES = 64 * 2**20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TARGET = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux",
          "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}  # fmt: skip
PEERS = ("diffusers", "denoising-diffusion-pytorch")
NOT_NEEDED = ("torch-fidelity", "plotly")  # no FID and no reports there


def main() -> None:
    """Fill the folder and print its size."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu", help="folder to fill")
    parser.add_argument("--cifar", type=Path, help=".tar.gz of train/CLASS/*.jpg or .png")
    parser.add_argument("--python312", help="Python 3.12 with the machine's torch and Triton")
    args = parser.parse_args()
    if args.cifar is not None:
        check_images(args.cifar)
    if args.python312 is not None:
        check_python(args.python312)
    args.out.mkdir(parents=True, exist_ok=True)
    fetch_wheels(args.out / "wheels")
    if args.cifar is None:
        print("no --cifar: the training run will be on the built-in shapes")
    else:
        (args.out / "cifar.tar.gz").unlink(missing_ok=True)
        shutil.copyfile(args.cifar, args.out / "cifar.tar.gz")
    write_commit(args.out / "commit.json")
    fill_cache(args.out, args.python312)
    check_size(args.out)


def fetch_wheels(folder: Path) -> None:
    """Download the wheels, and check that no requirement of theirs is missing."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        words += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        words += [word for name in PLATFORMS for word in ("--platform", name)]
        words += ["--dest", scratch, "--requirement", str(HERE / "wheels.txt")]
        try:
            run_limited(words, Path(scratch) / "pip.txt", 600)
        except CommandError as error:
            raise UserError(f"pip could not download the wheels: {error}") from None
        wheels = list(Path(scratch).glob("*.whl"))
        check_complete(wheels)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in wheels:
            shutil.move(path, folder / path.name)
    print(f"{len(wheels)} wheels, with all that they need")


def check_complete(paths: Iterable[Path]) -> None:
    """Raise UserError if the machine and the wheels do not meet all requirements.

    Versions are compared as far as they are known.
    """
    wheels = {parse_wheel_filename(path.name)[0]: path for path in paths}
    versions = read_list(HERE / "installed.txt")
    versions |= {name: str(parse_wheel_filename(p.name)[1]) for name, p in wheels.items()}
    queue: list[tuple[str, Iterable[Requirement]]] = [("the project", project_requirements())]
    queue += [(path.name, requirements(path)) for path in wheels.values()]
    for who, needed in queue:
        for one in needed:
            name = canonicalize_name(one.name)
            if name not in versions:
                raise UserError(f"{who} needs {one}, which the machine lacks: add it to wheels.txt")
            version = versions[name]
            if version is not None and not one.specifier.contains(version, prereleases=True):
                raise UserError(
                    f"{who} needs {one}, but there is {name} {version}: choose other versions in "
                    "wheels.txt"
                )
            if one.extras and name in wheels:
                extra = f"{wheels[name].name} with {', '.join(one.extras)}"
                queue.append((extra, requirements(wheels[name], one.extras)))


def read_list(path: Path) -> dict[str, str | None]:
    """Read names and, if known, versions."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    parts = [line.partition("==") for line in lines if line]
    return {canonicalize_name(name): version or None for name, _, version in parts}


def requirements(wheel: Path, extras: Iterable[str] = ("",)) -> list[Requirement]:
    """Return the requirements of a wheel on the machine."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(member))
    found = map(Requirement, metadata.get_all("Requires-Dist", []))
    targets = [TARGET | {"extra": extra} for extra in extras]
    return [r for r in found if r.marker is None or any(map(r.marker.evaluate, targets))]


def project_requirements() -> list[Requirement]:
    """Return the requirements of the trainers and of the peers that are timed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [r for r in map(Requirement, project["dependencies"]) if r.name not in NOT_NEEDED]
    peers = map(Requirement, project["optional-dependencies"]["peers"])
    return needed + [r for r in peers if r.name in PEERS]


def check_images(archive: Path) -> None:
    """Raise UserError if `archive` holds no pictures in class folders."""
    picture = re.compile(r"(.*/)?train/[^/]+/[^/]+\.(jpg|jpeg|png)$", re.IGNORECASE)
    try:
        with tarfile.open(archive) as tar:
            if any(picture.match(member.name) for member in tar):
                return
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or "no archive that can be read"
        raise UserError(f"--cifar is {archive}: {reason}: name a .tar.gz") from None
    raise UserError(f"--cifar is {archive}, which holds no train/CLASS/*.jpg: name another")


def check_python(python: str) -> None:
    """Raise UserError if an interpreter is not Python 3.12 with the machine's Triton."""
    expected = f"3.12 {read_list(HERE / 'installed.txt')['triton']}"
    code = "import sys, triton; print('%d.%d' % sys.version_info[:2], triton.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    except OSError as error:
        raise UserError(f"--python312 is {python}: {error.strerror}: name an interpreter") from None
    found = done.stdout.strip() or (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if found != expected:
        raise UserError(
            f"--python312 is {python}, with Python and Triton {found}: name one with {expected}"
        )


def write_commit(path: Path) -> None:
    """Write the commit's id, for a copy without .git."""
    from dgm.training.run_folder import describe_code  # slow: imports torch

    found = describe_code()
    path.write_text(json.dumps(found) + "\n")
    print(f"commit {found['git_commit']}{', with changes' if found['git_dirty'] else ''}")


def fill_cache(out: Path, python: str | None) -> None:
    """Compile our kernels for an H100 ahead of time, for the same version of Triton."""
    archive = out / "triton.tar.gz"
    archive.unlink(missing_ok=True)
    if python is None:
        print("no --python312: kernels are compiled on the GPU machine")
        return
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder, log = Path(scratch) / "cache", Path(scratch) / "log.txt"
        words = [python, ROOT / "tests" / "kernels" / "compile_for_gpu.py", "90"]
        env = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
        try:
            run_limited(words, log, 900, env)
        except CommandError as error:
            raise UserError(f"the kernels could not be compiled ahead of time: {error}") from None
        with tarfile.open(archive, "w:gz") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
    print(f"Triton's cache, {archive.stat().st_size / 2**20:.1f} MiB")


def check_size(folder: Path) -> None:
    """Print the size; raise UserError if the folder is too large to be copied."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise UserError(
            f"{folder} holds {size / 2**20:.1f} MiB, more than {MAX_BYTES // 2**20}: leave "
            "something out, --cifar first"
        )
    print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_command(main)
