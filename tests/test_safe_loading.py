"""No content of a file is executed, or unpacked elsewhere."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tars import write_tar

from dgm.common.errors import UserError
from dgm.evaluation import classifier, feature_cache
from dgm.evaluation.inception import inception_features
from dgm.training import checkpoint
from shards.images import decode_image
from shards.reader import Shards

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for package in ("dgm", "shards", "launch", "slurm")
    for path in (ROOT / package).rglob("*.py")
}

# Exceptions, and why.
JUSTIFIED = {
    ("dgm/evaluation/inception.py", "import pickle"): "only to catch the error of a refused pickle",
    ("slurm/submission.py", "runpy.run_path"): "--cluster debug runs the trainer that was named",
}
MODULES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
NEVER = {
    "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle", "numpy.fromfile",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all",
    "os.system", "os.popen", "os.execl", "subprocess.getoutput", "subprocess.getstatusoutput",
    "eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "shutil.unpack_archive",
}  # fmt: skip
REQUIRED = {
    "torch.load": ("weights_only", "True"),
    "numpy.load": ("allow_pickle", "False"),
    "yaml.load": ("Loader", "yaml.SafeLoader"),
}


def calls(source: str) -> list[tuple[str, dict[str | None, str]]]:
    """Return the functions that a source calls, and their keyword arguments."""
    return [
        (
            ast.unparse(node.func).replace("np.", "numpy.", 1),
            {word.arg: ast.unparse(word.value) for word in node.keywords},
        )
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
    ]


def faults(source: str) -> list[str]:
    """Return imports and calls that could execute or unpack the content of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
    for name, given in calls(source):
        if name in NEVER or name.endswith((".extractall", ".extract")):
            found.append(name)
        key, value = REQUIRED.get(name, ("", ""))
        if key and given.get(key) != value:
            found.append(f"{name} without {key}={value}")
        found += [key for key in ("allow_pickle", "shell") if given.get(key, "False") != "False"]
    return found


def test_no_source_executes_the_content_of_a_file() -> None:
    found = {(path, fault) for path, source in SOURCES.items() for fault in faults(source)}
    assert found == JUSTIFIED.keys()


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
    """Every YAML file of a user is read by dgm/common/yaml_io.py."""
    readers = {
        path
        for path, source in SOURCES.items()
        if any(name in ("yaml.load", "yaml.safe_load") for name, _ in calls(source))
    }
    assert readers == {"slurm/submit.py"}  # which reads the output of launch/preflight.py


# Pickles


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Return the file that the pickles create; show first that they do."""
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
    np.save(tmp_path / "evil.npy", np.array([Evil(ran)], object), allow_pickle=True)
    contents = [(tmp_path / "evil.npy").read_bytes(), pickle.dumps(Evil(ran))]
    for content in contents:
        with pytest.raises(UserError, match=r"x is not a readable|x holds object") as caught:
            decode_image(content, "x")
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"a\.tar"):
            Shards(write_tar(tmp_path / "a.tar", {"7.cls": b"1", "7.npy": content}))
    assert not ran.exists()


def test_pickles_in_caches_and_checkpoints_are_skipped(ran: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for write in (lambda c: torch.save(c, path), lambda c: path.write_bytes(pickle.dumps(c))):
        write({"stages.0.weight": Evil(ran)})
        assert classifier._read(path, 10) is None
        with pytest.warns(UserWarning, match=r"x\.safetensors is computed again: it is damaged"):
            assert feature_cache._read(path, {"format": 1}, warn=True) is None
    folder = tmp_path / "checkpoints" / "000000016"
    folder.mkdir(parents=True)
    for name in (*checkpoint.FILES, checkpoint.MANIFEST):
        (folder / name).write_bytes(pickle.dumps(Evil(ran)))
    with pytest.warns(UserWarning, match="is skipped"):
        assert checkpoint.newest(folder.parent) is None
    assert not ran.exists()


# Commands in the configurations of others


@pytest.mark.parametrize("key", ["shards", "test_shards"])
def test_a_command_in_the_configuration_of_a_run_is_refused(
    tmp_path: Path, key: str, monkeypatch
) -> None:
    from dataclasses import replace

    from dgm.cli.load_run import TrainedRun, open_train_data
    from dgm.cli.train_ddpm import Config
    from dgm.training.run_folder import as_yaml

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = Config()
    data = replace(config.data, **{"shards": str(tmp_path), key: f"pipe:touch {tmp_path}/ran"})
    (tmp_path / "config.yaml").write_text(as_yaml(replace(config, data=data)))
    with pytest.raises(UserError, match=rf"config\.yaml has data\.{key} pipe:touch"):
        open_train_data(tmp_path, TrainedRun("diffusion", cast(Any, None), {}, [], 0))
    assert not (tmp_path / "ran").exists()
