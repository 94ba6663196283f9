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
from dgm.evaluation.distances import FeatureStatistics
from dgm.evaluation.features import FeatureExtractor
from dgm.tensor_files import save_tensors
from dgm.training.device_loader import Images
from dgm.training.engine import Engine

_FORMAT = 1  # version of the file format


@dataclass(frozen=True)
class DatasetFeatures:
    """Features of the images of a data set."""

    features: Tensor  # float32 [N, D], in the data set's order
    statistics: FeatureStatistics


def cached_features(
    engine: Engine, folder: Path, extractor: FeatureExtractor, data: Images, data_id: str
) -> DatasetFeatures:
    """Return the features of a data set, computed once and cached in a file of `folder`.

    A file of another version, or a damaged one, is named in a warning and replaced.
    Collective: call on all ranks.
    """
    path = folder / f"features-{extractor.name}-{data_id}.safetensors"
    header = {
        "format": _FORMAT,
        "data": data_id,
        "features": extractor.name,
        "version": extractor.version,
        "resizer": extractor.resizer,
        "count": len(data),
    }
    cached = _read(path, header, engine.is_main)
    if not engine.any_rank(cached is None):
        assert cached is not None, "if one rank had no cached features, all would compute them"
        return cached
    if engine.is_main:
        print(f"computing {extractor.name} features of {len(data):,} real images, once for this "
              "data set", flush=True)  # fmt: skip
    features = extractor.compute(engine, len(data), data.images)[0]
    computed = DatasetFeatures(features, FeatureStatistics.from_features(features))
    engine.on_main(lambda: _write(path, header, computed))
    return computed


def _read(path: Path, header: dict[str, object], warn: bool) -> DatasetFeatures | None:
    if not path.exists():
        return None
    reason = "it is damaged"
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("header", "{}"))
            differing = [key for key, value in header.items() if stored.get(key) != value]
            if not differing:
                mean, covariance = (file.get_tensor(k).numpy() for k in ("mean", "covariance"))
                features = file.get_tensor("features")
                size = features.shape[1]
                if len(features) == header["count"] and covariance.shape == (size, size):
                    return DatasetFeatures(features, FeatureStatistics(mean, covariance))
            else:
                key = differing[0]
                reason = f"its {key} is {stored.get(key)!r}, not {header[key]!r}"
    except (OSError, SafetensorError, ValueError, AttributeError):
        pass
    if warn:
        warnings.warn(f"{path} is computed again: {reason}", stacklevel=2)
    return None


def _write(path: Path, header: dict[str, object], computed: DatasetFeatures) -> None:
    tensors = {
        "features": computed.features,
        "mean": torch.from_numpy(np.ascontiguousarray(computed.statistics.mean)),
        "covariance": torch.from_numpy(np.ascontiguousarray(computed.statistics.covariance)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial:
            save_tensors(partial, tensors, {"header": json.dumps(header)})
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written, so features are computed each time: {error}",
            stacklevel=2,
        )
