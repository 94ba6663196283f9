"""Tests of a missing optional library are skipped; in CI that is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = "tests/slurm/test_quoting.py"
TEST = (
    "tests/training/test_launch_env.py::"
    "test_deepspeed_is_imported_quietly_and_compiles_no_operator_for_inference"
)


@pytest.mark.slow
def test_tests_of_a_missing_library_skip_and_fail_in_ci() -> None:
    words = ["-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors", FILE, TEST]
    start = (
        "import sys, pytest; sys.modules['submitit'] = sys.modules['deepspeed'] = None; "
        f"sys.exit(pytest.main({words}))"
    )
    for variable, expected in (("", 0), ("1", 1)):
        environment = {**os.environ, "DGM_SKIP_IS_FAILURE": variable}
        done = subprocess.run(
            [sys.executable, "-c", start],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == expected, done.stdout + done.stderr
        for library in ("submitit", "deepspeed"):
            assert f"{library} missing: pip install {library}" in done.stdout
        assert done.stdout.count("nothing may be missing here") == (2 if variable else 0)
