"""What the parts of a session share: folders, environment, commands, and results."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgm.common.atomic_io import replacing, write_whole
from dgm.common.errors import UserError
from tests.gpu.processes import CommandError, last_line, run_limited
from tests.gpu.schedule import Outcome

MAX_FILE_BYTES = 4 * 2**20  # larger files are not packed
NEEDED = ("jsonargparse", "webdataset", "accelerate", "safetensors", "torchvision", "yaml", "PIL")


class Session:
    """Folders and environment of one session; its results are packed again after each part."""

    def __init__(self, out: Path, scratch: Path, prepared: Path, dry_run: bool):
        """Pack into `out`, work in `scratch`, and take what `prepare.py` made from `prepared`."""
        self.out, self.scratch, self.prepared, self.dry_run = out, scratch, prepared, dry_run
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

    def python(self, name: str, words: Sequence[str | Path], seconds: float) -> Path:
        """Run `python WORDS` from the root and return its log; raise CommandError if it fails."""
        log = self.pack_folder / f"{name}.txt"
        run_limited([sys.executable, *words], log, seconds, self.env)
        return log

    def benchmark(self, name: str, words: Sequence[str], seconds: float) -> dict[str, Any]:
        """Run a benchmark and return its results; raise CommandError if it fails."""
        result = self.pack_folder / f"{name}.json"
        self.python(name, ["launch/benchmark.py", *words, "--json", result], seconds)
        found: dict[str, Any] = json.loads(result.read_text())[words[0]]
        return found

    def start(self, seconds: float) -> None:
        """Install the wheels and check the machine, within `seconds` each.

        Raise UserError if there is no usable GPU or a package is missing.
        """
        wheels = sorted((self.prepared / "wheels").glob("*.whl"))
        if wheels and not self.dry_run:
            site = self.scratch / "site"
            words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            words += ["--no-cache-dir", "--upgrade", "--target", str(site)]
            self.python("pip", [*words, *wheels], seconds)
            paths = (str(site), self.env.get("PYTHONPATH"))
            self.env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        try:
            words = ["-m", "tests.gpu.machine", *(["--dry-run"] if self.dry_run else [])]
            log = self.python("machine", words, seconds)
        except CommandError:
            line = last_line(self.pack_folder / "machine.txt")
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: ")) from None
            raise
        self.summary["machine"] = json.loads(last_line(log))
        if missing := self.missing("packages", NEEDED):
            raise UserError(
                f"{', '.join(missing)} missing here: run `python tests/gpu/prepare.py` where there "
                "is a network, and copy .gpu/ to this machine"
            )

    def missing(self, name: str, modules: Sequence[str]) -> list[str]:
        """Return the modules that commands cannot import."""
        code = f"import importlib.util as u; print(*(m for m in {modules} if not u.find_spec(m)))"
        return self.python(name, ["-c", code], 30).read_text().split()

    def unpack(self, name: str, folder: Path) -> bool:
        """Unpack an archive that `prepare.py` made; return whether there is one."""
        archive = self.prepared / name
        if not archive.exists():
            return False
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return True

    def report(self, name: str, outcome: Outcome, packing: bool = True) -> None:
        """Record the outcome of a part, pack all results so far, and print it."""
        limit = "" if outcome.limit is None else f" of {outcome.limit:.0f}"
        took = f" ({outcome.seconds:.0f}{limit} s)" if outcome.state != "left out" else ""
        with self._lock:
            self.summary["parts"][name] = asdict(outcome)
        if packing:
            self.pack()
        print(f"{outcome.state:9} {name}{took}: {outcome.detail}", flush=True)

    def pack(self) -> None:
        """Write all.tar.gz and summary.json atomically."""
        for name in ("metrics.jsonl", "loss.png", "environment.json", "config.yaml", "samples"):
            source, target = self.training / name, self.pack_folder / "training" / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.exists():
                shutil.copy(source, target)
        with self._lock:
            files = [path for path in sorted(self.pack_folder.rglob("*")) if path.is_file()]
            too_large = [path for path in files if path.stat().st_size > MAX_FILE_BYTES]
            self.summary["too_large"] = [str(p.relative_to(self.pack_folder)) for p in too_large]
            write_whole(self.out / "summary.json", json.dumps(self.summary, indent=1))
            with replacing(self.out / "all.tar.gz") as path, tarfile.open(path, "w:gz") as tar:
                tar.add(self.out / "summary.json", "summary.json")
                for file in files:
                    if file not in too_large:
                        tar.add(file, file.relative_to(self.pack_folder))
