"""Redaction of credentials in addresses."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]*@")
_KEY = re.compile(
    r"([?&][\w.-]*(?:token|secret|signature|sig|key|password)[\w.-]*=)[^&\s'\"]+", re.I
)


def without_password(text: str) -> str:
    """Return text with passwords and keys of addresses replaced: https://***@host/x?token=***."""
    return _KEY.sub(r"\1***", _PASSWORD.sub("***@", text))
