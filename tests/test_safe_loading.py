"""Nothing that a file says is run, unpacked elsewhere, or shown as HTML; no secret is written."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from written_runs import ENVIRONMENT, opened, write_run

from dgm.addresses import without_password
from dgm.errors import UserError
from dgm.eval import classifier, real
from dgm.eval.inception import inception_features
from dgm.report.exercise import Exercise, exercise_page
from dgm.report.failures import Failure
from dgm.report.measure import read_measure
from dgm.report.outcome import Expectation
from dgm.report.page import make_page
from dgm.train import checkpoint
from dgm.train.run_folder import describe_machine
from shards.errors import ShardError
from shards.images import decode_image
from shards.read import Shards

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dgm", "shards", "launch", "slurm")

# What may stand in the sources, and why.
JUSTIFIED = {
    ("dgm/eval/inception.py", "import pickle"): "only to catch the error of a refused pickle",
    ("slurm/submission.py", "runpy.run_path"): "--cluster debug runs the trainer that was named",
}
NEVER = {
    "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle", "numpy.fromfile",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all",
    "os.system", "os.popen", "os.execl", "subprocess.getoutput", "subprocess.getstatusoutput",
    "eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "shutil.unpack_archive",
}  # fmt: skip


def name_of(node: ast.expr) -> str:
    """Write a.b.c as in the source; np is numpy."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts)).replace("np.", "numpy.", 1)


def faults(source: str) -> list[str]:
    """List what in a source would run, or unpack, what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unsafe = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
            found += [f"import {name}" for name in names if name.split(".")[0] in unsafe]
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {word.arg: word.value for word in node.keywords}
        said = {key: getattr(value, "value", None) for key, value in given.items()}
        if name in NEVER or name.endswith((".extractall", ".extract")):
            found.append(name)
        if name == "torch.load" and said.get("weights_only") is not True:
            found.append("torch.load without weights_only")
        if name == "numpy.load" and said.get("allow_pickle") is not False:
            found.append("numpy.load without allow_pickle=False")
        if "allow_pickle" in said and said["allow_pickle"] is not False:
            found.append("allow_pickle")
        if "shell" in said and said["shell"] is not False:
            found.append("shell")
        if name == "yaml.load" and name_of(given.get("Loader", ast.Name(""))) != "yaml.SafeLoader":
            found.append("yaml.load")
    return found


def test_no_source_runs_what_a_file_says() -> None:
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        place = str(path.relative_to(ROOT))
        for fault in faults(path.read_text()):
            found[place, fault] = True
    assert found.keys() == JUSTIFIED.keys()


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)",
        "import pickle", "from pickle import loads", "import cloudpickle", "np.load(path)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, yaml.Loader)", "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)", "yaml.unsafe_load(text)", "eval(text)",
        "exec(text)", "tar.extractall(folder)", "tar.extract(name)", "os.system(text)",
        "subprocess.run(text, shell=True)", "subprocess.run(text, shell=maybe)", "os.popen(x)",
    ],
)  # fmt: skip
def test_each_unsafe_call_is_seen(source: str) -> None:
    assert faults(source)


def test_yaml_is_read_in_one_place_only() -> None:
    """Every YAML that a person may have written goes through yaml_file.py."""
    readers = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if any(
            isinstance(node, ast.Call) and name_of(node.func) in ("yaml.load", "yaml.safe_load")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert readers == {"slurm/submit.py"}  # what launch/preflight.py answered, by way of a pipe


# Pickles


class Evil:
    """Makes a file as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Name the file that the pickles make; show first that they do."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()
    path.unlink()
    return path


def test_a_pickle_given_as_weights_of_inception_is_refused(ran: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in ({"fc.weight": Evil(ran)}, Evil(ran)):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"weights\.pth is damaged or of another net") as caught:
            inception_features(path, torch.device("cpu"))
        assert "\n" not in str(caught.value) and not ran.exists()
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"weights\.pth is damaged or of another net"):
            inception_features(path, torch.device("cpu"))
        assert not ran.exists()


def test_a_pickle_in_a_shard_is_refused(ran: Path, tmp_path: Path) -> None:
    import io
    import tarfile

    np.save(tmp_path / "evil.npy", np.array([Evil(ran)], object), allow_pickle=True)
    contents = [(tmp_path / "evil.npy").read_bytes(), pickle.dumps(Evil(ran))]
    for content in contents:
        with pytest.raises(ShardError, match=r"x is no readable|x holds object") as caught:
            decode_image(content, "x")
        assert "\n" not in str(caught.value)
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in (("7.cls", b"1"), ("7.npy", content)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with pytest.raises(ShardError, match=r"a\.tar"):
            Shards(path)
    assert not ran.exists()


def test_pickles_in_caches_and_checkpoints_are_passed_over(ran: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for write in (lambda c: torch.save(c, path), lambda c: path.write_bytes(pickle.dumps(c))):
        write({"stages.0.weight": Evil(ran)})
        assert classifier._read(path, 10) is None
        with pytest.warns(UserWarning, match=r"x\.safetensors is made again: it is damaged"):
            assert real._read(path, {"format": 1}, say=True) is None
    folder = tmp_path / "checkpoints" / "000000016"
    folder.mkdir(parents=True)
    for name in (*checkpoint.FILES, checkpoint.MANIFEST):
        (folder / name).write_bytes(pickle.dumps(Evil(ran)))
    with pytest.warns(UserWarning, match="is passed over"):
        assert checkpoint.newest(folder.parent) is None
    assert not ran.exists()


# Commands in configurations that somebody else wrote


@pytest.mark.parametrize("key", ["shards", "test_shards"])
def test_a_run_of_others_brings_no_commands(tmp_path: Path, key: str, monkeypatch) -> None:
    from dataclasses import replace

    from dgm.train.run_folder import as_yaml
    from launch.train_ddpm import Config
    from launch.trained import open_data

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = Config()
    data = replace(config.data, **{"shards": str(tmp_path), key: f"pipe:touch {tmp_path}/ran"})
    (tmp_path / "config.yaml").write_text(as_yaml(replace(config, data=data)))
    with pytest.raises(UserError, match=rf"config\.yaml has data\.{key} pipe:touch"):
        open_data(tmp_path)
    assert not (tmp_path / "ran").exists()


# Pages

EVIL = [
    "<script>alert(1)</script>", "</style><script>x</script>", '"><img src=x onerror=alert(1)>',
    "' onmouseover='x", "</title><svg onload=x>", "<!--", "]]><b>", "javascript:x", "&lt;i&gt;",
    "\u2028<i>", "</pre></code><iframe>",
]  # fmt: skip
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "script", "h1", "h2", "h3", "p",
    "table", "caption", "thead", "tbody", "tr", "th", "td", "button", "div", "ul", "li", "details",
    "summary", "pre", "code", "figure", "figcaption", "img", "svg", "line", "polyline", "circle",
    "text", "g", "path", "rect",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "scope", "type", "data-value",
    "viewbox", "role", "aria-label", "aria-hidden", "points", "cx", "cy", "r", "x", "y", "x1", "x2",
    "y1", "y2", "src", "alt", "width", "height", "text-anchor", "transform", "d", "colspan",
}  # fmt: skip


class Tags(HTMLParser):
    """Every tag and attribute of a page, and how often scripts and styles begin."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.other: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)


def assert_harmless(page: str) -> None:
    seen = Tags(page)
    assert set(seen.tags) <= TAGS, set(seen.tags) - TAGS
    assert seen.attributes <= ATTRIBUTES, seen.attributes - ATTRIBUTES
    assert seen.tags.count("script") == 1 and seen.tags.count("style") == 1
    assert not seen.other and all(source.startswith("data:image/png") for source in seen.sources)


@pytest.mark.parametrize("evil", EVIL)
def test_pages_hold_no_tag_or_attribute_of_others(tmp_path: Path, evil: str) -> None:
    settings = {"data": {"source": evil}, "optim": {"note": evil, evil: evil}}
    folder = write_run(tmp_path / "x", [3.0, 2.0, 1.0], settings=settings)
    with open(folder / "metrics.jsonl", "a") as file:
        for seen in (400, 500):
            line = {"images_seen": seen, f"train/{evil}": 1.0, f"train/{evil}/loss": 2.0}
            file.write(json.dumps({**line, f"eval/{evil}": 1.0, f"time/{evil}_s": 1.0}) + "\n")
    environment = {**ENVIRONMENT, "engine": evil, "git_commit": evil, evil: {evil: [evil]},
                   "command": [evil, "--x", evil], "devices": [evil]}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    start = {"time": evil, "images_seen": 0, "changed": {evil: [evil, {evil: 1}]}, "engine": evil}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    by_class = {f"{name}_by_class": {evil: 0.5} for name in ("class_consistency", evil)}
    (folder / "evaluation.json").write_text(
        json.dumps({evil: {evil: 1.0}, "x": evil, "class_consistency": by_class})
    )
    other = opened(write_run(tmp_path / "y", [2.0, 1.0]), evil + "2")
    run = opened(folder, evil)
    failures = [Failure(evil, evil, f"error: {evil}")]
    assert_harmless(make_page(evil, [run], []))
    assert_harmless(make_page(evil, [run, other], failures))
    measure = read_measure(f"final train/{evil.replace(' ', '')}/loss")
    expected = Expectation(evil, measure, True, evil, "other")
    exercise = Exercise(evil, evil, [expected], [measure], [measure], True, ["samples"])
    groups = {evil: [run], "other": [other]}
    assert_harmless(exercise_page(exercise, groups, [evil, evil]))


# Secrets

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "hidden-1", "HF_TOKEN": "hidden-2", "MY_PASSWORD": "hidden-3",
    "WANDB_API_KEY": "hidden-4",
}  # fmt: skip
ADDRESS = "https://me:hidden-5@host/x/{000..004}.tar?token=hidden-6&a=1"


def test_addresses_are_shown_without_what_lets_their_owner_in() -> None:
    assert without_password(ADDRESS) == "https://***@host/x/{000..004}.tar?token=***&a=1"
    assert without_password("s3://b/x?X-Amz-Signature=ab%2F&y=2") == (
        "s3://b/x?X-Amz-Signature=***&y=2"
    )
    for plain in ("https://host/a@b", "a@b.c", "--key=3", "https://host/?page=3", "ssh a@b://c"):
        assert without_password(plain) == plain


def test_no_secret_is_written_of_machine_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_ddpm.py", "--data.shards", ADDRESS])
    told = json.dumps(describe_machine())
    assert "hidden" not in told and "host/x" in told


def test_no_secret_is_shown_on_a_page(tmp_path: Path) -> None:
    settings = {"data": {"source": "x", "shards": ADDRESS, "test_shards": ADDRESS}}
    folder = write_run(tmp_path / "x", [3.0, 2.0, 1.0], settings=settings)
    environment = {**ENVIRONMENT, "command": ["train_ddpm.py", f"--data.shards={ADDRESS}"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    page = make_page("x", [opened(folder), opened(write_run(tmp_path / "y", [1.0]))], [])
    assert "hidden-" not in page and "***@host/x" in page


def test_a_failed_fetch_does_not_show_the_password(tmp_path: Path, monkeypatch) -> None:
    from shards.read import open_shards

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for spec in ("none://me:hidden@127.0.0.1:9/x.tar", "file://me:hidden@127.0.0.1:9/x.tar"):
        with pytest.raises(ShardError, match="could not be fetched") as caught:
            open_shards(spec)
        assert "hidden" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_no_secret_is_in_any_file_of_a_run(
    run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    script = ROOT / "launch" / "train_ddpm.py"
    words = [script, "--config", tiny_config, "--run.dir", tmp_path / "run"]
    done = run_warm(*words, variables=SECRETS)
    assert done.code == 0, done.stderr
    done = run_warm(ROOT / "launch" / "report.py", tmp_path / "run", variables=SECRETS)
    assert done.code == 0, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [p for p in files if b"hidden-" in p.read_bytes()]


def test_no_secret_is_in_what_is_submitted(tmp_path: Path) -> None:
    """The configuration of a job keeps an address whole, for the job needs it: only we read it."""
    code = f"""
import sys
from pathlib import Path
from slurm.checks import Plan
from slurm.options import Asked, Options
from slurm.resources import Resources
from slurm.submission import Submission, note
run = Path({str(tmp_path / "run")!r})
config = {{"data": {{"shards": {ADDRESS!r}}}, "train": {{"total_images": 1}}}}
plan = Plan("", run, config, (1,), 0, "")
made = Submission(Asked("x.py", Options(), Resources(gpus_per_node=0), []), run / "slurm" / "now",
                  [plan], {{}})
made.home.mkdir(parents=True)
made.write()
made.job(plan).snapshot(plan.record)
sys.argv = ["submit", {ADDRESS!r}]
note(made, plan, cluster="local", job="local-1", pid=1)
"""
    variables = {**os.environ, **SECRETS}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    with_secret = {
        path.relative_to(tmp_path / "run" / "slurm"): path.stat().st_mode & 0o777
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and b"hidden-" in path.read_bytes()
    }
    assert with_secret == {Path("now/configs/run.yaml"): 0o600, Path("config.yaml"): 0o600}
