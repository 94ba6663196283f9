"""Tests of a missing optional library are skipped; in CI that is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST = "test_deepspeed_is_imported_quietly_and_compiles_no_operator_for_inference"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "tests", "code", "code_in_ci"),
    [
        ("submitit", "tests/slurm/test_quoting.py", 5, 2),  # no test is left; a broken file
        ("deepspeed", f"tests/training/test_launch_env.py::{TEST}", 0, 1),
    ],
)
def test_tests_of_a_missing_library_skip_and_fail_in_ci(
    library: str, tests: str, code: int, code_in_ci: int
) -> None:
    start = (
        f"import sys, pytest; sys.modules[{library!r}] = None; "
        f"sys.exit(pytest.main(['-rs', '-p', 'no:cacheprovider', {tests!r}]))"
    )
    for variable, expected in (("", code), ("1", code_in_ci)):
        environment = {**os.environ, "DGM_SKIP_IS_FAILURE": variable}
        done = subprocess.run(
            [sys.executable, "-c", start],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == expected, done.stdout + done.stderr
        assert f"{library} missing: pip install {library}" in done.stdout
        assert ("nothing may be missing here" in done.stdout) == bool(variable)
