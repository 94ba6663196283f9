"""Inception's features, by torch-fidelity's net and weights from a local file.

Nothing is downloaded: the error for a missing file names its address.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.evaluation.features import FeatureExtractor

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 95_628_359
SIDE = 299
_LAYERS = ["2048", "logits_unbiased"]  # for FID and KID; for the Inception score


def inception_features(path: Path, device: torch.device) -> FeatureExtractor:
    """Return the Inception net of Heusel et al. 2017 as torch-fidelity computes it.

    With other weights that fit the net it is named `inception-<sha256>`, as a distance in its
    features is not an FID. Raise UserError if the file is missing or does not hold weights of
    this net.
    """
    if not path.is_file():
        raise UserError(
            f"the weights of Inception are not at {path}: download {URL} to it ({SIZE:,} bytes, "
            f"sha256 {SHA256}), give --weights PATH, or choose --features classifier, which needs "
            "none"
        )
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give --weights PATH") from None
    if digest != SHA256:
        _check(path)
    # Imported here: it is slow, and the project's classifier does not need it.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", _LAYERS, feature_extractor_weights_path=str(path)
        )
    except RuntimeError:  # names or shapes that do not fit
        raise UserError(_wrong(path, "its tensors are not those of the net")) from None
    net = net.to(device)

    def forward(images: np.ndarray) -> tuple[Tensor, Tensor]:
        features, logits = net(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))
        return features, logits

    if digest != SHA256:
        warnings.warn(
            f"{path} holds other weights of Inception than the standard ones (sha256 {digest}): "
            "the metrics cannot be compared with published ones", stacklevel=2,
        )  # fmt: skip
    name = "inception" if digest == SHA256 else f"inception-{digest[:8]}"
    resizer = f"bilinear to {SIDE} x {SIDE} as in TensorFlow 1, within torch-fidelity's net"
    return FeatureExtractor(name, digest[:12], resizer, forward, 50)


def _check(path: Path) -> None:
    """Raise UserError if a file is not a dictionary of tensors, without running code in it."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise UserError(_wrong(path, "it cannot be read as a file of weights")) from None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(_wrong(path, "it does not hold tensors by name"))


def _wrong(path: Path, reason: str) -> str:
    return (
        f"{path} is damaged or of another net ({reason}; {path.stat().st_size:,} bytes instead of "
        f"{SIZE:,}): download {URL} to it, sha256 {SHA256}, or choose --features classifier"
    )
