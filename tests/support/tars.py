"""Tars of labeled images as other tools write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def encode(image: np.ndarray, extension: str) -> bytes:
    """Return an image as a file; all formats but JPEG are lossless."""
    stream = io.BytesIO()
    if extension == "npy":
        np.save(stream, image)
    else:
        kind = {"jpg": "JPEG"}.get(extension, extension.upper())
        Image.fromarray(image).save(stream, kind, quality=90, lossless=True)
    return stream.getvalue()


def members(
    images: Iterable[np.ndarray],
    labels: Iterable[object],
    extension: str = "npy",
    kind: str = "cls",
    first: int = 0,
) -> dict[str, bytes]:
    """Return the names and contents of labeled images, with four-digit keys from `first` on."""
    content = {}
    for number, (image, label) in enumerate(zip(images, labels, strict=False), start=first):
        content[f"{number:04d}.{kind}"] = str(label).encode()
        content[f"{number:04d}.{extension}"] = encode(image, extension)
    return content


def write_tar(path: Path, content: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """Write a plain tar and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content.items() if isinstance(content, dict) else content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
