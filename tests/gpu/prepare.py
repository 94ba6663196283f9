"""Prepare a session on a GPU machine without a network: `python tests/gpu/prepare.py`.

From the root of the repository, where there is a network; no GPU is needed. Fills .gpu/, which git
ignores, with the wheels that the machine lacks, CIFAR images, the commit's id, and Triton's cache
of our compiled kernels; at most 64 MiB in all. Copy it to the GPU machine with the code, and run
`python tests/gpu/run.py 560` there.
"""

from __future__ import annotations

import argparse
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
from packaging.utils import canonicalize_name

from dgm.common.command_line import Parser
from dgm.common.errors import UserError
from tests.gpu.command import run
from tests.gpu.processes import CommandError, run_command

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MOST_BYTES = 64 * 2**20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TARGET = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux",
          "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}  # fmt: skip
PEERS = ("diffusers", "denoising-diffusion-pytorch")
NOT_NEEDED = ("torch-fidelity", "plotly")  # no FID and no reports there


def main() -> int:
    """Fill the folder and print its size."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu", help="folder to fill")
    parser.add_argument("--cifar", type=Path, help=".tar.gz of train/CLASS/*.jpg or .png")
    parser.add_argument("--python312", help="Python 3.12 with the machine's torch and Triton")
    parser.add_argument("--wheels-only", action="store_true")
    args = parser.parse_args()
    if args.cifar is not None:
        check_images(args.cifar)
    if args.python312 is not None:
        check_python(args.python312)
    args.out.mkdir(parents=True, exist_ok=True)
    fetch_wheels(args.out / "wheels")
    if not args.wheels_only:
        if args.cifar is None:
            print("no --cifar: training there will be on the built-in shapes")
        else:
            (args.out / "cifar.tar.gz").unlink(missing_ok=True)
            shutil.copyfile(args.cifar, args.out / "cifar.tar.gz")
        write_commit(args.out / "commit.json")
        fill_cache(args)
    return check_size(args.out)


def fetch_wheels(folder: Path) -> None:
    """Download the wheels anew, and check that nothing that they need is missing."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        words += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        words += [word for name in PLATFORMS for word in ("--platform", name)]
        words += ["--dest", scratch, "--requirement", str(HERE / "wheels.txt")]
        log = Path(scratch) / "pip.txt"
        try:
            run_command(words, log, 600, os.environ, ROOT)
        except CommandError as error:
            raise UserError(f"pip could not download the wheels: {error}") from None
        log.unlink()
        wheels = {name_of(path): path for path in Path(scratch).glob("*.whl")}
        check_complete(wheels)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in wheels.values():
            shutil.move(path, folder / path.name)
    print(f"{len(wheels)} wheels, all that they need is there")


def name_of(wheel: Path) -> str:
    """Return the package's name."""
    return canonicalize_name(wheel.name.split("-")[0])


def version_of(wheel: Path) -> str:
    """Return the package's version."""
    return wheel.name.split("-")[1]


def check_complete(wheels: dict[str, Path]) -> None:
    """Raise UserError where the project or a wheel needs what neither the machine nor a wheel has.

    Or has in a version that does not fit, as far as versions are known.
    """
    versions = read_list(HERE / "installed.txt")
    versions |= {name: version_of(path) for name, path in wheels.items()}
    asking: list[tuple[str, Iterable[Requirement]]] = [("the project", project_requirements())]
    asking += [(path.name, requirements(path)) for path in wheels.values()]
    for who, needed in asking:
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
                asking.append((extra, requirements(wheels[name], one.extras)))


def read_list(path: Path) -> dict[str, str | None]:
    """Read names and, where they are known, versions."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    parts = [line.partition("==") for line in lines if line]
    return {canonicalize_name(name): version or None for name, _, version in parts}


def requirements(wheel: Path, extras: Iterable[str] = ("",)) -> list[Requirement]:
    """Return what a wheel needs on the machine."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(member))
    found = map(Requirement, metadata.get_all("Requires-Dist", []))
    return [one for one in found if applies(one, extras)]


def applies(one: Requirement, extras: Iterable[str] = ("",)) -> bool:
    """Return whether a requirement holds on the machine."""
    marker = one.marker
    return marker is None or any(marker.evaluate(TARGET | {"extra": extra}) for extra in extras)


def project_requirements() -> list[Requirement]:
    """Return what the trainers and the peers that are timed need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["peers"]]
    found = [Requirement(text) for text in named]
    peers = {Requirement(text).name for text in project["optional-dependencies"]["peers"]}
    left_out = (peers - set(PEERS)) | set(NOT_NEEDED)
    return [one for one in found if one.name not in left_out]


def check_images(archive: Path) -> None:
    """Raise UserError where `archive` holds no pictures in class folders."""
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
    """Raise UserError where an interpreter is not Python 3.12 with the machine's Triton."""
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
    """Write which commit this is, which a copy without .git cannot ask."""
    commit = _git("rev-parse", "HEAD")
    found = {"git_commit": commit, "git_dirty": bool(_git("status", "--porcelain"))}
    path.write_text(json.dumps(found) + "\n")
    print(f"commit {commit}{', with changes' if found['git_dirty'] else ''}")


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def fill_cache(args: argparse.Namespace) -> None:
    """Compile our kernels for an H100 ahead of time; only the same Triton finds them."""
    archive = args.out / "triton.tar.gz"
    archive.unlink(missing_ok=True)
    if args.python312 is None:
        print("no --python312: Triton compiles there")
        return
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        folder, log = Path(scratch) / "cache", Path(scratch) / "log.txt"
        words = [args.python312, ROOT / "tests" / "kernels" / "compile_for_gpu.py", "90"]
        env = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
        try:
            run_command(words, log, 900, env, ROOT)
        except CommandError as error:
            raise UserError(f"the kernels could not be compiled ahead of time: {error}") from None
        with tarfile.open(archive, "w:gz") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
    print(f"Triton's cache, {archive.stat().st_size / 2**20:.1f} MiB")


def check_size(folder: Path) -> int:
    """Print the size; raises UserError where the folder is too large to be carried."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise UserError(
            f"{folder} holds {size / 2**20:.1f} MiB, more than {MOST_BYTES // 2**20}: leave "
            "something out, --cifar first"
        )
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    run(main)
