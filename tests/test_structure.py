"""Directions of imports, and functions that fit a screen."""

import ast
import graphlib
from pathlib import Path

import pytest

from dgm.cli.parser import TRAINERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dgm", "shards", "launch", "slurm")
FAMILIES = tuple(TRAINERS)
ONLY_IN = {
    "accelerate": ("dgm/training/", "dgm/benchmarks/"),  # benchmarks: part of a peer's loop
    "deepspeed": ("dgm/training/",),
    "webdataset": ("shards/", "dgm/benchmarks/"),  # there it is the peer
    "diffusers": ("dgm/benchmarks/",),
    "denoising_diffusion_pytorch": ("dgm/benchmarks/",),
    "normflows": ("dgm/benchmarks/",),
    "pythae": ("dgm/benchmarks/",),
    "submitit": ("slurm/",),
    "torch_fidelity": ("dgm/evaluation/",),
}


def sources() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("shards", "launch", "slurm"):
        return parts[0]
    if parts[0] != "dgm" or len(parts) == 1:
        return None
    if parts[1] in ALLOWED:
        return parts[1]
    is_package = (ROOT / "dgm" / parts[1]).is_dir()
    assert not is_package or parts[1] == "nn", f"add dgm/{parts[1]} to ALLOWED, or to TRAINERS"
    return "base"


BASE = {"common", "base"}
EVERY = {*BASE, *FAMILIES, "training", "evaluation", "report", "cli", "shards"}
ALLOWED = {
    "common": {"common"},
    "base": BASE,
    **{family: {*BASE, family} for family in FAMILIES},
    "training": {*BASE, "training"},
    "evaluation": {*BASE, *FAMILIES, "training", "evaluation"},
    "report": {*BASE, "report"},
    "cli": {*EVERY, "benchmarks"},
    "api": {*EVERY, "api"},
    "benchmarks": {*EVERY, "benchmarks"},
    "shards": {"common", "shards"},
    "slurm": {"common", "slurm"},
    "launch": {"common", "cli", "training"},
}

EXCEPTIONS = {"dgm/cli/reference": {"slurm"}}  # the generated page lists the options of slurm, too


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_directions(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    own = layer(".".join(relative.parts).removesuffix(".__init__"))
    if own is None:
        return
    allowed = ALLOWED[own] | EXCEPTIONS.get(str(relative), set())
    wrong = {m for m in imports(path) if (there := layer(m)) and there not in allowed}
    assert not wrong, f"{relative} ({own}) imports {sorted(wrong)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_are_imported_in_their_packages_only(library: str) -> None:
    users = [p for p in sources() if any(m.split(".")[0] == library for m in imports(p))]
    assert not [p for p in users if not str(p.relative_to(ROOT)).startswith(ONLY_IN[library])]


def test_imports_have_no_cycles() -> None:
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources()}
    graph = {
        name: imports(path, top_level_only=True) & known.keys() for name, path in known.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_functions_stay_readable() -> None:
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.name} {length}")
    assert not long


def test_package_files_do_nothing_at_import() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            body = ast.parse(path.read_text()).body
            if path == ROOT / "dgm" / "__init__.py":  # imports its public names on first use
                body = [n for n in body if not isinstance(n, ast.If | ast.Assign | ast.FunctionDef)]
            assert all(isinstance(n, ast.Expr | ast.Import | ast.ImportFrom) for n in body), path
