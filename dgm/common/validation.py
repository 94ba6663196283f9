"""Ranges that settings and options are held to."""

from __future__ import annotations

import math
from typing import Any

from dgm.common.errors import UserError


def check_range(
    settings: Any,
    prefix: str,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Raise UserError where one of the settings, or of a list's numbers, is out of range.

    `prefix` stands before a name in what is said: `train.` or `--`. None is left alone.
    """
    for name in names:
        value = getattr(settings, name.replace("-", "_"))
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is None or (
                (least is None or each >= least)
                and (above is None or each > above)
                and (most is None or each <= most)
                and abs(each) != math.inf
            ):
                continue
            said = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{prefix}{name} is {said}: choose {_range(least, above, most)}")


def _range(least: float | None, above: float | None, most: float | None) -> str:
    if least is not None:
        return f"{least} or more" if most is None else f"{least} to {most}"
    lower = "a number" if above is None else f"a number above {above}"
    return lower if most is None else f"{lower}, at most {most}"
