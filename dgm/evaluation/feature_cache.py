"""Features of the real images, computed once for a data set and a net."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgm.common.atomic_io import replacing
from dgm.evaluation.features import Features
from dgm.evaluation.frechet import Moments
from dgm.tensor_files import save_tensors
from dgm.training.device_loader import Images
from dgm.training.engine import Engine

_FORMAT = 1  # of the file


@dataclass(frozen=True)
class Described:
    """What a net sees in the images of a data set."""

    features: Tensor  # float32 [N, D], in the data set's order
    moments: Moments


def describe_real(
    engine: Engine, folder: Path, features: Features, data: Images, data_id: str
) -> Described:
    """Describe every image of a data set, or read what was found before from a file in `folder`.

    A file of another version, or a damaged one, is named in a warning and made again. All
    processes must ask.
    """
    path = folder / f"features-{features.name}-{data_id}.safetensors"
    header = {
        "format": _FORMAT,
        "data": data_id,
        "features": features.name,
        "version": features.version,
        "resizer": features.resizer,
        "count": len(data),
    }
    found = _read(path, header, engine.is_main)
    if not engine.any_rank(found is None):
        assert found is not None, "else all would describe them"
        return found
    if engine.is_main:
        print(f"describing {len(data):,} real images by {features.name}, once for this data set",
              flush=True)  # fmt: skip
    seen = features.describe_all(engine, data)
    made = Described(seen, Moments.of(seen))
    engine.on_main(lambda: _write(path, header, made))
    return made


def _read(path: Path, header: dict[str, object], say: bool) -> Described | None:
    if not path.exists():
        return None
    reason = "it is damaged"
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("header", "{}"))
            other = [key for key, value in header.items() if told.get(key) != value]
            if not other:
                mean, covariance = (file.get_tensor(k).numpy() for k in ("mean", "covariance"))
                found = Described(file.get_tensor("features"), Moments(mean, covariance))
                _check(found, header)
                return found
            reason = f"its {other[0]} is {told.get(other[0])!r}, not {header[other[0]]!r}"
    except (OSError, SafetensorError, ValueError, AttributeError):
        pass
    if say:
        warnings.warn(f"{path} is made again: {reason}", stacklevel=2)
    return None


def _check(found: Described, header: dict[str, object]) -> None:
    size = found.features.shape[1]
    if len(found.features) != header["count"] or found.moments.covariance.shape != (size, size):
        raise ValueError("tensors of another shape than the header says")


def _write(path: Path, header: dict[str, object], made: Described) -> None:
    tensors = {
        "features": made.features,
        "mean": torch.from_numpy(np.ascontiguousarray(made.moments.mean)),
        "covariance": torch.from_numpy(np.ascontiguousarray(made.moments.covariance)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial:
            save_tensors(partial, tensors, {"header": json.dumps(header)})
    except OSError as error:
        warnings.warn(f"{path} cannot be written and is made each time: {error}", stacklevel=2)
