"""Run cases of bad input in a folder with the files that their commands name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dgm.cli.parser import TRAINERS
from tests.bad_inputs.case import Case

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RIGHTS = ROOT / "tests" / "support" / "without_rights.py"
FAMILIES = tuple(TRAINERS.values())


class World:
    """A folder with configurations, images, shards and trained runs."""

    def __init__(self, folder: Path, run: Callable[..., Any], pictures: Path, shards: Path):
        """Write configurations. `run` runs a script in `cwd`, and returns `code` and `stderr`."""
        self.folder, self.run = folder, run
        for name in ("launch", "accelerate_config.yaml"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(pictures, folder / "pictures")
        shutil.copytree(shards, folder / "shards")
        for family in FAMILIES:
            tiny = ROOT / "launch" / "configs" / f"{family}_tiny.yaml"
            config = yaml.safe_load(tiny.read_text())
            config["data"] = {"source": "shapes", "shards": "shards", "test_shards": "shards"}
            config["train"]["total_images"] = 32
            config["run"] = {"dir": "new", "trackers": []}
            (folder / f"{family}.yaml").write_text(yaml.safe_dump(config))

    def check(self, case: Case) -> str:
        """Run a case, check exit code, message and that no file has changed; return the message."""
        self._train(f"{case.command} {case.needs}")
        shared = self._list()
        if case.prepare is not None:
            case.prepare(self.folder)
        before = self._list()
        words = script_and_words(case.command)
        if case.without_rights:
            words = [WITHOUT_RIGHTS, *words]
        done = self.run(*words, cwd=self.folder)
        after = self._list()
        self._remove(after.keys() - shared.keys())
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert done.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        for fragment in (case.thing, case.value, case.remedy):
            assert fragment in lines[0], lines[0]
        assert after == before
        return lines[0]

    def _train(self, command: str) -> None:
        """Train the runs that a command names, once."""
        for family in {*re.findall(r"runs/(\w+)", command)} & {*FAMILIES}:
            if not (self.folder / "runs" / family).exists():
                script = ROOT / "launch" / f"train_{family}.py"
                words = ["--config", f"{family}.yaml", "--run.dir", f"runs/{family}"]
                done = self.run(script, *words, cwd=self.folder)
                assert done.code == 0, done.stderr

    def _list(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time of each file by its path, (0, 0) for a folder."""
        found = {}
        for folder, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                stat = os.lstat(path)
                key = os.path.relpath(path, self.folder)
                found[key] = (0, 0) if os.path.isdir(path) else (stat.st_size, stat.st_mtime_ns)
        return found

    def _remove(self, names: set[str]) -> None:
        for name in sorted(names):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def script_and_words(command: str) -> list[Any]:
    """Return the file and arguments of `python launch/x.py ...` or `python -m package.module`."""
    _, script, *words = shlex.split(command)
    if script == "-m":
        module, *words = words
        script = f"{module.replace('.', '/')}.py"
    return [ROOT / script, *words]
