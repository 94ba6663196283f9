"""Algorithms and precision of the device, set before anything runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import LAUNCH, SCRIPTS

from dgm.common.errors import UserError
from dgm.training import engine
from dgm.training.process_settings import apply_device_settings, start_engine

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"
ROOT = LAUNCH.parent


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restore the settings of this process."""
    environment = {name: os.environ.pop(name, None) for name in (CUBLAS, INDUCTOR)}
    yield
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    apply_device_settings()
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is not None:
        inductor.deterministic = False


def test_deterministic_covers_torch_and_cudnn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apply_device_settings()
    assert not torch.are_deterministic_algorithms_enabled() and CUBLAS not in os.environ
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    apply_device_settings(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ[CUBLAS] == ":4096:8"


@pytest.mark.slow
def test_the_compiler_is_set_without_being_imported():
    code = """
import sys
from dgm.training.process_settings import apply_device_settings
apply_device_settings(deterministic=True)
compiler = [name for name in sys.modules if name.startswith(("torch._inductor", "torch._dynamo"))]
assert not compiler, compiler
import torch._inductor.config as config
assert config.deterministic
config.deterministic = False
apply_device_settings(deterministic=True)  # after it was imported
assert config.deterministic
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_set_for_convolutions_and_matrix_products(tf32: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_device_settings(tf32=tf32)
        # Libraries read the older or the newer names.
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        assert (matmul.fp32_precision == "tf32") == (conv.fp32_precision == "tf32") == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with torch.backends.cudnn.flags(enabled=False):  # which reads and sets all of them
            pass
        assert torch.backends.cudnn.allow_tf32 == tf32
        # The compiler warns if TF32 is off, but that is the chosen setting.
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication", stacklevel=1)


def test_a_workspace_that_is_not_reproducible_is_refused():
    os.environ[CUBLAS] = ":0:0"
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.*unset it, or set it"):
        apply_device_settings(deterministic=True)
    apply_device_settings()  # without the key it is the user's choice
    assert os.environ[CUBLAS] == ":0:0"
    os.environ[CUBLAS] = ":16:8"
    apply_device_settings(deterministic=True)
    assert os.environ[CUBLAS] == ":16:8"


def test_settings_are_applied_before_an_engine_touches_a_device(monkeypatch: pytest.MonkeyPatch):
    def touch(*_: object, **__: object) -> None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        raise LookupError(deterministic, torch.backends.cudnn.allow_tf32)

    monkeypatch.setattr(engine, "Accelerator", touch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", touch)
    with pytest.raises(LookupError) as touched:
        start_engine("no", deterministic=True, tf32=True)
    assert touched.value.args == (True, True) and os.environ[CUBLAS] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(LookupError) as touched:
        start_engine("auto", deterministic=True)  # checks first whether the GPU has bf16
    assert touched.value.args == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("family", SCRIPTS)
def test_every_family_trains_to_the_same_bytes_with_the_key(
    family: str, run_warm: Callable, tiny_configs: dict[str, Path], tmp_path: Path
):
    words = [LAUNCH / SCRIPTS[family], "--config", tiny_configs[family], "--train.deterministic"]
    words += ["--run.trackers=[]", "--train.total_images=64"]
    found = []
    for name in ("a", "b"):
        done = run_warm(*words, "--run.dir", tmp_path / name)
        assert done.code == 0, done.stderr
        saved = sorted((tmp_path / name / "checkpoints").rglob("*.safetensors"))
        found.append([(path.name, path.read_bytes()) for path in saved])
    assert found[0] == found[1] and len(found[0]) >= 2
