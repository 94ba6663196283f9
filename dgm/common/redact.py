"""Addresses as they may be shown and written down."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]*@")
_KEY = re.compile(
    r"([?&][\w.-]*(?:token|secret|signature|sig|key|password)[\w.-]*=)[^&\s'\"]+", re.I
)


def without_password(text: str) -> str:
    """Leave out of addresses what lets their owner in: https://***@host/x?token=***."""
    return _KEY.sub(r"\1***", _PASSWORD.sub("***@", text))
