"""Damage to files, drawn by hypothesis: to their bytes, or to their values."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dgm.common.errors import UserError

EXAMPLES = int(os.environ.get("DGM_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """Return settings for `count` fixed examples, or for DGM_EXAMPLES random ones."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def flipped(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the content with one bit flipped."""
    changed = bytearray(content)
    changed[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the content after one to three flips, cuts, insertions, repetitions or overwrites."""
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        size = draw(st.sampled_from([1, 2, 10, 100, 512, 5000]))
        kind = draw(st.sampled_from(["flip", "cut", "end", "insert", "zero", "fill", "repeat"]))
        if kind == "flip":
            content = draw(flipped(content))
        elif kind == "cut":
            content = content[:at] + content[at + size :]
        elif kind == "end":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
        elif kind == "repeat":
            content = content[: at + size] + content[at:]
        else:
            byte = b"\0" if kind == "zero" else b"\xff"
            content = content[:at] + byte * min(size, len(content) - at) + content[at + size :]
    return content


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", " ", "1", "1e-3", "null", "../x", "/etc/passwd", "a\nb", "a\0b", "\x1b[31m",
    "<b>", "[/b]", "x" * 300, "é☃", [], [1], ["a"], [[]], {}, {"a": 1}, {"": {}}, [None, {}],
]  # fmt: skip
DEEP: Any = 1
for _ in range(200):
    DEEP = [DEEP]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Return a JSON document with a value changed, removed or added somewhere."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    where, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["change", "change", "remove", "add"]))
    value = draw(st.sampled_from([*NASTY, DEEP]))
    if kind == "change":
        where[key] = copy.deepcopy(value)
    elif kind == "remove":
        del where[key]
    elif isinstance(where, dict):
        where[draw(st.sampled_from(["", "x", "spread_over_seeds", "a/b", "<i>"]))] = value
    else:
        where.insert(key, value)
    return document


def _places(document: Any):
    inside = list(
        document.items() if isinstance(document, dict)
        else enumerate(document) if isinstance(document, list) else ()
    )  # fmt: skip
    for key, value in inside:
        yield document, key
        yield from _places(value)


def attempt(read: Callable, *named: object) -> Any:
    """Return what `read` returns; None after a UserError of one line that contains these names."""
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        assert all(str(name) in message for name in named), message
        return None
