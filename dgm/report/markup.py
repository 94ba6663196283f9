"""HTML out of parts: whatever is not HTML yet is escaped."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from dgm.common.redact import without_password

_WITHOUT_END = {"meta", "img", "br"}


@dataclass(frozen=True)
class Html:
    """Text that is HTML already."""

    text: str


def element(name: str, /, *inside: object, **attributes: object) -> Html:
    """Make an element; what is None is left out, within it and of its attributes.

    `class_` is the attribute class, `data_value` data-value.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{plain(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _WITHOUT_END else f"</{name}>"
    return Html(f"<{name}{given}>{join(*inside).text}{end}")


def plain(value: object) -> str:
    """Escape a value; a page is shown to others, so passwords in addresses are left out."""
    return escape(without_password(str(value)))


def join(*parts: object) -> Html:
    """Put parts behind each other; what is None is left out."""
    texts = (p.text if isinstance(p, Html) else plain(p) for p in parts if p is not None)
    return Html("".join(texts))
