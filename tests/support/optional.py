"""Optional libraries that tests need."""

from __future__ import annotations

import importlib.util

import pytest


def need(library: str) -> None:
    """Skip the test, or the file, that calls this where an optional library is missing."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} missing: pip install {library}", allow_module_level=True)
