"""Trying bad inputs out, in a folder that holds what the commands name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from shards import shapes
from tests.bad_inputs.case import Case

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RIGHTS = ROOT / "tests" / "support" / "without_rights.py"
TRAINERS = {"ddpm": "train_ddpm", "gan": "train_gan", "vae": "train_vae", "flow": "train_flow"}
NUM_IMAGES = 120  # of the pictures

Run = Callable[..., Any]
"""Runs words as a script, with `cwd`, and gives `code`, `stdout` and `stderr`."""


class World:
    """A folder in which a user makes mistakes: configurations, pictures, shards, trained runs."""

    def __init__(self, folder: Path, run: Run):
        """Write what all cases share; shards and runs are made when a case first names them."""
        self.folder, self.run = folder, run
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("launch", "accelerate_config.yaml"):
            (folder / name).symlink_to(ROOT / name)
        for family in TRAINERS:
            told = yaml.safe_load((ROOT / "launch" / "configs" / f"{family}_tiny.yaml").read_text())
            told["data"] = {"source": "shapes", "shards": "shards", "test_shards": "shards"}
            told["train"]["total_images"] = 32
            told["run"] = {"dir": "new", "trackers": []}
            (folder / f"{family}.yaml").write_text(yaml.safe_dump(told))

    def need(self, command: str) -> None:
        """Make the pictures, shards and runs that a command names, or its configuration."""
        if re.search(r"\bpictures\b|\bshards\b(?!\.)|\.yaml|runs/", command):
            self._make_shards()
        for family in re.findall(r"runs/(\w+)", command):
            if family in TRAINERS and not (self.folder / "runs" / family).exists():
                script = ROOT / "launch" / f"{TRAINERS[family]}.py"
                words = [script, "--config", f"{family}.yaml", "--run.dir", f"runs/{family}"]
                done = self.run(*words, cwd=self.folder)
                assert done.code == 0, done.stderr

    def _make_shards(self) -> None:
        from PIL import Image

        pictures = self.folder / "pictures"
        if pictures.exists():
            return
        for index in range(NUM_IMAGES):
            folder = pictures / shapes.CLASSES[index % len(shapes.CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.render("train", index)).save(folder / f"{index:04d}.png")
        words = ["--source", "folder:pictures", "--split", "train", "--out", "shards"]
        done = self.run(ROOT / "shards" / "build.py", *words, cwd=self.folder)
        assert done.code == 0, done.stderr

    def try_out(self, case: Case) -> tuple[Any, list[str]]:
        """Run a case; give what it left on the screen, and what is wrong with that."""
        self.need(f"{case.command} {case.needs}")
        shared = self.listing()
        if case.prepare is not None:
            case.prepare.make(self.folder)
        before = self.listing()
        script, *words = script_and_words(case.command)
        if case.without_rights:
            script, words = WITHOUT_RIGHTS, [script, *words]
        done = self.run(script, *words, cwd=self.folder)
        left = {str(p) for p, what in self.listing().items() if before.get(p) != what}
        left |= {f"{p} is gone" for p in before if not os.path.lexists(self.folder / p)}
        self.clear(shared)
        return done, [
            *faults(case, done),
            *([f"changed {', '.join(sorted(left))}"] if left else []),
        ]

    def listing(self) -> dict[str, tuple[int, int]]:
        """List all paths with size and time of change; of folders, that they are there."""
        found = {}
        for folder, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                stat = os.lstat(path)
                whole = (stat.st_size, stat.st_mtime_ns)
                found[os.path.relpath(path, self.folder)] = (0, 0) if os.path.isdir(path) else whole
        return found

    def clear(self, shared: dict[str, tuple[int, int]]) -> None:
        """Remove what a case has added."""
        for name in sorted(self.listing().keys() - shared.keys()):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def script_and_words(command: str) -> list[Any]:
    """Turn `python launch/x.py ...` or `python -m package.module ...` into a file and its words."""
    _, script, *words = shlex.split(command)
    if script == "-m":
        module, *words = words
        return [ROOT / f"{module.replace('.', '/')}.py", *words]
    return [ROOT / script, *words]


def faults(case: Case, done: Any) -> list[str]:
    """Say what is wrong with an answer to bad input."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    found = []
    if done.code != 2:
        found.append(f"code {done.code}")
    if "Traceback" in done.stderr:
        found.append("a traceback")
    if len(lines) != 1 or not lines[0].startswith("error: "):
        found.append(f"{len(lines)} lines: {done.stderr.strip()[-600:]!r}")
        return found
    for what in ("thing", "value", "remedy"):
        if getattr(case, what) not in lines[0]:
            found.append(f"no {what} '{getattr(case, what)}'")
    return found
