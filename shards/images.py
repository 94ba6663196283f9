"""Decoding and encoding image files, in threads and in order.

Threads, not processes: Pillow releases the GIL, and a process that has initialized torch must not
fork.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dgm.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image as PillowImage

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
WHITE: Colour = (255, 255, 255)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_CHUNK = 64  # items of one task
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Formats of Pillow that are not images or need other programs: videos, documents, brushes, arrays.
_NO_IMAGES = frozenset(
    ("BUFR", "EPS", "FITS", "FLI", "GBR", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
)


@dataclass(frozen=True)
class Decoded:
    """A decoded image file."""

    pixels: np.ndarray
    """uint8 [H, W, 3], RGB"""
    transparent: bool = False
    """Whether it had transparent parts, which were composited on the background."""
    several_frames: bool = False
    """Whether it has more frames or pages than the first, which is used."""


@cache
def _formats() -> tuple[str, ...]:
    """Return the image formats that the installed Pillow decodes, in the order it tries them."""
    from PIL import Image

    Image.preinit()  # the usual formats first, as Image.open tries them
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN.keys() - _NO_IMAGES)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes (`.png`) of the image formats that the installed Pillow decodes."""
    from PIL import Image

    readable = _formats()
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in readable)


def parse_background(text: str) -> Colour:
    """Return the colour of `white`, `black` or `R,G,B`; raise UserError for anything else."""
    named = {"white": WHITE, "black": (0, 0, 0)}
    if text in named:
        return named[text]
    parts = text.split(",")
    try:
        red, green, blue = (int(part) for part in parts)
    except ValueError:
        red = -1
    if red < 0 or not all(0 <= value <= 255 for value in (red, green, blue)):
        raise UserError(f"background is '{text}'; choose white, black or R,G,B, each from 0 to 255")
    return red, green, blue


def decode_image(
    content: bytes, name: str, resize: int | None = None, background: Colour = WHITE
) -> Decoded:
    """Decode an image file, in any format that Pillow reads, or npy.

    resize: center-crop to a square and resize to this side length, bicubic; background: colour
    under transparent images.
    Raise UserError with `name` where the content is empty, damaged or not an 8-bit image.
    """
    if not content:
        raise UserError(f"{name} is empty (0 bytes); delete or replace it")
    if content.startswith(b"\x93NUMPY"):
        return Decoded(crop_and_resize(_decode_npy(content, name), resize))
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, and refuses those of twice that size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Restricted by content, not by name: Pillow would run Ghostscript on EPS.
            opened = Image.open(io.BytesIO(content), formats=_formats())
        with opened:
            if opened.mode in _DEEP_MODES:
                raise UserError(f"{name} has mode {opened.mode}; convert it to 8 bits per channel")
            image, transparent = _on_background(ImageOps.exif_transpose(opened), background)
            several = False
            with suppress(Exception):  # a damaged second frame does not matter
                several = bool(getattr(opened, "is_animated", False))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        reason = " ".join(str(error).split(" <_io")[0].split())[:200]
        raise UserError(
            f"{name} is not a readable image ({reason}); replace or delete it"
        ) from None
    return Decoded(crop_and_resize(np.asarray(image), resize), transparent, several)


def _on_background(image: PillowImage.Image, background: Colour) -> tuple[PillowImage.Image, bool]:
    """Return an image as RGB, and whether any of it was transparent."""
    from PIL import Image

    # `transparency` marks a palette entry or a single colour as transparent.
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return image.convert("RGB"), False
    whole = image.convert("RGBA")
    lowest, _ = whole.getchannel("A").getextrema()
    if lowest == 255:
        return image.convert("RGB"), False
    ground = Image.new("RGBA", whole.size, (*background, 255))
    return Image.alpha_composite(ground, whole).convert("RGB"), True


def crop_and_resize(image: np.ndarray, side: int | None) -> np.ndarray:
    """Center-crop uint8 [H, W, 3] to a square and resize it, bicubic; None: unchanged."""
    if side is None or image.shape[:2] == (side, side):
        return image
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(image), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(fitted)


def _decode_npy(content: bytes, name: str) -> np.ndarray:
    stream = io.BytesIO(content)
    try:
        # Not np.load, which allocates as much memory as a damaged header requests.
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
    except Exception as error:  # NumPy's header parser raises many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{name} is not a readable npy file ({reason}); replace or delete it"
        ) from None
    pixels = content[stream.tell() :]
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
        raise UserError(f"{name} holds {dtype} {list(shape)}; images must be uint8 [H, W, 3]")
    if math.prod(shape) != len(pixels):
        raise UserError(
            f"{name} is not a readable npy file ({len(pixels)} bytes for {list(shape)}); "
            "replace or delete it"
        )
    image = np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(image)


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def ordered_map(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Apply `function` in threads and yield the results in the order of `items`.

    Only a few chunks are in flight, which limits memory.
    """
    workers = min(16, os.cpu_count() or 1)
    items = iter(items)
    pending: deque[Future[list[_Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while part := list(islice(items, _CHUNK)):
                pending.append(pool.submit(lambda part: [function(item) for item in part], part))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
