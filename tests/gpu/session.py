"""What the parts of a session share: folders, environment, commands, and what is packed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgm.common.errors import UserError
from tests.gpu.processes import CommandError, last_line, run_command
from tests.gpu.schedule import Outcome

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 4 * 2**20  # bytes of a packed file
NEEDED = ("jsonargparse", "webdataset", "accelerate", "safetensors", "torchvision", "yaml", "PIL")


class Session:
    """Folders and environment of one session; what it finds is packed again after each part."""

    def __init__(self, out: Path, scratch: Path, prepared: Path, dry_run: bool):
        """Pack into `out`, work in `scratch`, and take what was `prepared`."""
        self.out, self.scratch, self.dry_run = out, scratch, dry_run
        self.prepared = prepared
        self.pack_folder, self.training = scratch / "pack", scratch / "training"
        self.pack_folder.mkdir()
        self.summary: dict[str, Any] = {"dry_run": dry_run, "parts": {}, "figures": {}}
        self._lock = threading.Lock()
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.env["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
        self.env["TRITON_CACHE_DIR"] = str(scratch / "triton")
        if dry_run:
            self.env |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
            self.env.setdefault("OMP_NUM_THREADS", "1")
        else:
            self.env["XDG_CACHE_HOME"] = str(scratch / "cache")

    def python(
        self, name: str, words: Sequence[str | Path], seconds: float,
        variables: Mapping[str, str] | None = None,
    ) -> Path:  # fmt: skip
        """Run `python WORDS` from the root and return its log; raises CommandError."""
        log = self.pack_folder / f"{name}.txt"
        env = self.env | dict(variables or {})
        run_command([sys.executable, *words], log, seconds, env, ROOT)
        return log

    def benchmark(self, name: str, words: Sequence[str], seconds: float) -> dict[str, Any]:
        """Run a benchmark and return its figures; raises CommandError."""
        result = self.pack_folder / f"{name}.json"
        self.python(name, ["launch/benchmark.py", *words, "--json", result], seconds)
        found: dict[str, Any] = json.loads(result.read_text())[words[0]]
        return found

    def install_wheels(self, seconds: float) -> str:
        """Install what `prepare` fetched, beside the scratch files; raises UserError."""
        wheels = sorted((self.prepared / "wheels").glob("*.whl"))
        if wheels and not self.dry_run:
            site = self.scratch / "site"
            options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
            self.python(
                "pip", ["-m", "pip", "install", "-q", *options, "--target", site, *wheels], seconds
            )
            paths = (str(site), self.env.get("PYTHONPATH"))
            self.env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return f"{len(wheels)} wheels"

    def check_machine(self, seconds: float) -> None:
        """Raise UserError where there is no GPU to use, or a needed package is missing."""
        words = ["-m", "tests.gpu.machine", *(["--dry-run"] if self.dry_run else [])]
        try:
            log = self.python("machine", words, seconds)
        except CommandError:
            line = last_line(self.pack_folder / "machine.txt")
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: ")) from None
            raise
        self.summary["machine"] = json.loads(last_line(log))

    def check_packages(self, seconds: float) -> None:
        """Raise UserError where a package that training needs is missing."""
        code = "import importlib.util as u; print(*(m for m in {!r} if u.find_spec(m) is None))"
        log = self.python("packages", ["-c", code.format(NEEDED)], seconds)
        if missing := log.read_text().split():
            raise UserError(
                f"{', '.join(missing)} missing here: run `python tests/gpu/prepare.py` where there "
                "is a network, and bring .gpu/ along"
            )

    def has(self, module: str) -> bool:
        """Return whether the commands could import a module."""
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        try:
            self.python("packages", ["-c", code], 30)
        except CommandError:
            return False
        return True

    def unpack(self, name: str, folder: Path) -> bool:
        """Unpack an archive of `prepare` into a folder; return whether there is one."""
        archive = self.prepared / name
        if not archive.exists():
            return False
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return True

    def report(self, name: str, outcome: Outcome, packing: bool = True) -> None:
        """Keep what became of a part, pack what there is, and then say so."""
        limit = "" if outcome.limit is None else f" of {outcome.limit:.0f}"
        took = f" ({outcome.seconds:.0f}{limit} s)" if outcome.state != "left out" else ""
        with self._lock:
            self.summary["parts"][name] = asdict(outcome)
        if packing:
            self.pack()
        print(f"{outcome.state:9} {name}{took}: {outcome.detail}", flush=True)

    def pack(self) -> None:
        """Write all.tar.gz and summary.json anew, whole or not at all."""
        for name in ("metrics.jsonl", "loss.png", "environment.json", "config.yaml", "samples"):
            source, target = self.training / name, self.pack_folder / "training" / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.exists():
                shutil.copy(source, target)
        with self._lock:
            text = json.dumps(self.summary, indent=1)
            (self.pack_folder / "summary.json").write_text(text)
            left_out = self.summary["too_large"] = []
            unfinished = self.out / "all.tar.gz.part"
            with tarfile.open(unfinished, "w:gz") as tar:
                for path in sorted(self.pack_folder.rglob("*")):
                    if path.is_file() and path.stat().st_size <= LARGEST:
                        tar.add(path, path.relative_to(self.pack_folder))
                    elif path.is_file():
                        left_out.append(str(path.relative_to(self.pack_folder)))
            unfinished.replace(self.out / "all.tar.gz")
            short = self.out / "summary.json.part"
            short.write_text(json.dumps(self.summary, indent=1))
            short.replace(self.out / "summary.json")
