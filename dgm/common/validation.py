"""Range checks of settings and command-line options."""

from __future__ import annotations

import math
from typing import Any

from dgm.common.errors import UserError


def check_range(
    settings: Any,
    prefix: str,
    *names: str,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
) -> None:
    """Raise UserError where a setting, or an element of a list, is out of range.

    prefix: printed before a name, `train.` or `--`; above: exclusive minimum. A setting of None is
    not checked.
    """
    for name in names:
        value = getattr(settings, name.replace("-", "_"))
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is None or (
                (min is None or each >= min)
                and (above is None or each > above)
                and (max is None or each <= max)
                and abs(each) != math.inf
            ):
                continue
            given = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{prefix}{name} is {given}: choose {_range(min, above, max)}")


def _range(min: float | None, above: float | None, max: float | None) -> str:
    if min is not None:
        return f"{min} or more" if max is None else f"{min} to {max}"
    lower = "a number" if above is None else f"a number above {above}"
    return lower if max is None else f"{lower}, at most {max}"
