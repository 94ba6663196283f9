"""Compare the numbers of two runs of a script."""

from __future__ import annotations

import pytest


def same(one: object, other: object, rel: float = 1e-3) -> bool:
    """Return whether all values are equal, numbers up to rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], rel) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same(a, b, rel) for a, b in pairs)
    return one == (pytest.approx(other, rel=rel) if isinstance(other, float) else other)
