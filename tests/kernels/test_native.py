"""Kernels in C++, where they can be compiled and where not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dgm.nn.kernels import native
from dgm.nn.layers import group_norm, use_kernels


def test_without_a_compiler_warns_once_and_uses_torchs_operators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), group_norm(64, silu=True))
        x = torch.randn(1, 32, 16, 16)
        plain = net(x)
        use_kernels(net)
        with pytest.warns(UserWarning, match="could not be compiled .*no-compiler") as caught:
            made = net(x)
        assert len(caught) == 1
        assert torch.equal(made, plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(x)
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho cannot find the header >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot find the header.*install a newer g"):
            assert native.library() is None
        assert not list((tmp_path / "cache").rglob("*.so"))
    finally:
        native.library.cache_clear()


def test_a_copy_of_the_code_uses_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert native.library() is not None
    copies = [tmp_path / path.name for path in native._SOURCES]
    for path, copied in zip(native._SOURCES, copies, strict=True):
        copied.write_text(path.read_text())
    monkeypatch.setattr(native, "_SOURCES", tuple(copies))
    monkeypatch.setattr(native.subprocess, "run", None)  # so that nothing can be compiled
    native._load()
