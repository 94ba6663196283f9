"""Label, unit, direction and protocol of every metric that training and evaluation write.

A metric is identified by the last part of its key: `eval/fd_classifier`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

FRACTION = "fraction"  # in [0, 1], written in percent
_BITS = "bits per dimension"


@dataclass(frozen=True)
class Metric:
    """Label, unit and better direction of a metric."""

    label: str = ""
    """Name on pages and plots; empty: the last part of the key, with spaces for underscores."""
    unit: str = ""
    direction: Literal["min", "max"] | None = None
    """Which value is better; None for neither, such as a term of a sum or a value to be matched."""
    protocol: str = ""
    """How it is computed and how to read it, in a few words."""


_TRAINING = {
    "loss": Metric("loss", "", "min", "of test images, as in training; lower is better"),
    "loss_simple": Metric(direction="min"),
    "loss_real": Metric(direction="min"),
    "loss_fake": Metric(direction="min"),
    "vlb_bits_per_dim": Metric("", _BITS, "min"),
    "bits_per_dim_exact": Metric("", _BITS, "min"),
    "bits_per_dim_bound": Metric("", _BITS, "min"),
    "log_prob_z_bits_per_dim": Metric("", _BITS),
    "log_det_bits_per_dim": Metric("", _BITS),
    "elbo": Metric(direction="max"),
    "reconstruction_nll": Metric(direction="min"),
    "accuracy": Metric("", FRACTION),  # of a discriminator, which is not to be maximized
    "lr": Metric("learning rate"),
    "grad_norm": Metric("norm"),
    "images_per_s": Metric("", "images/s", "max"),
}

_SAMPLES = {
    "fid": Metric("FID", "", "min", "Frechet distance in Inception's features; 0 if identical"),
    "kid": Metric("KID", "", "min", "kernel distance in Inception's features; 0 if identical"),
    "inception_score": Metric(
        "Inception score", "", "max", "confident and evenly spread classes; higher is better"
    ),
    "class_consistency": Metric(
        "", FRACTION, "max", "generated images that the classifier assigns to the requested class"
    ),
    "class_certainty": Metric("", FRACTION, "max", "mean probability of the likeliest class"),
    "classifier_accuracy_on_real_test_images": Metric(
        "", FRACTION, None, "of the classifier itself: the highest consistency to expect"
    ),
    "diversity": Metric(
        "", "", None, "mean distance within a class, divided by that of real images"
    ),
    "min_diversity_of_a_class": Metric("", "", None, "0 if all its images are the same"),
    "coverage_of_classes": Metric("", FRACTION, "max", "mean over classes; 97 % for real images"),
    "min_coverage_of_a_class": Metric("", FRACTION, "max", "0 for a class that is left out"),
    "fraction_by_class": Metric("", FRACTION, None, "of the generated images"),
    "distance_in_features": Metric("", "", None, "median, to the nearest training image"),
    "distance_in_pixels": Metric(
        "", "grey levels", None, "median RMS distance to the nearest training image"
    ),
    "distance_of_test_in_features": Metric(),
    "distance_of_test_in_pixels": Metric("", "grey levels"),
    "seconds_per_image": Metric(
        "seconds for an image", "s", "min", "generated with the run's sample.* settings"
    ),
    "num_parameters": Metric("parameters"),
}
for _space in ("features", "pixels"):
    _SAMPLES[f"ratio_in_{_space}"] = Metric(
        "", "", None, "divided by that of test images; 1 is as novel as these, 0 a copy"
    )
    _SAMPLES[f"nearer_than_test_in_{_space}"] = Metric(
        "", FRACTION, None, "nearer to training images than 99 % of test images; 1 % if as novel"
    )

_FEATURES = {
    "fd": Metric(
        "FD", "", "min", "Frechet distance in features of the project's classifier, not FID"
    ),
    "kd": Metric(
        "KD", "", "min", "kernel distance in features of the project's classifier, not KID"
    ),
    "score": Metric(
        "", "", "max", "as the Inception score, by the classifier's classes; higher is better"
    ),
    "precision": Metric("", FRACTION, "max", "generated images within the real manifold"),
    "recall": Metric("", FRACTION, "max", "real images within the generated manifold"),
    "density": Metric(
        "", "", "max", "how densely real images surround generated ones; 1 for real ones"
    ),
    "coverage": Metric(
        "", FRACTION, "max", "real images with a generated one nearby; 97 % for real ones"
    ),
}
"""Metrics whose key ends in the features that they are computed in: `fd_classifier`."""

_IMAGES = {
    "exact": Metric(
        "bits/dim, exact for dequantized data", _BITS, "min",
        "its mean over the dequantization noise is a bound for stored images",
    ),
    "bound": Metric("bits/dim, bound", _BITS, "min"),
    "importance_weighted": Metric("bits/dim, importance-weighted bound", _BITS, "min"),
    "error": Metric("standard error of bits/dim", _BITS),
    "discretization_error": Metric("estimated discretization error", _BITS),
    "loss_error": Metric("standard error of the loss"),
    "eps_mse": Metric(
        "squared error of eps", "", "min", "of test images, whichever target the net predicts"
    ),
    "eps_mse_error": Metric("standard error of the squared error of eps"),
    "rms_error_grey_levels": Metric(
        "error in grey levels", "grey levels", "min", "RMS error of reconstructions; 0 is perfect"
    ),
    "psnr_db": Metric("PSNR, dB", "dB", "max", "the RMS error in decibels; higher is better"),
    "psnr_db_of_ends": Metric("", "dB", "max"),
    "ssim": Metric("SSIM", "", "max", "structural similarity; 1 is perfect"),
    "feature_distance": Metric("", "", "min"),
    "class_seen": Metric("", FRACTION, "max"),
    "class_seen_real": Metric("", FRACTION),
    "active_latents": Metric(
        "fraction of latent dimensions that are active", FRACTION, None,
        "variance of the posterior mean over images above 0.01 (Burda et al. 2016)",
    ),
    "num_active": Metric("number of active latent dimensions"),
}  # fmt: skip

METRICS = {**_TRAINING, **_SAMPLES, **_IMAGES}
_DETAILS = ("_by_class", "_by_quartile", "_by_timestep")
_VARIANTS = ("_noised", "_denoised")
_UNIT_OF_ENDING = {"_s": "s", "_gib": "GiB", "_kwh": "kWh"}


def find_metric(key: str) -> Metric:
    """Return the metric of a key; an unknown key has only a label, and a unit by its ending.

    `fd_classifier` and `fd_inception-0a1b2c3d` are FD in those features, `coverage_by_class` is a
    coverage, `psnr_db_noised` a PSNR.
    """
    parts = key.replace(" ", "_").split("/")
    name = next((part for part in parts if part.endswith(_DETAILS)), parts[-1])
    label = name.replace("_", " ")
    if name in METRICS:
        found = METRICS[name]
        return found if found.label else dataclasses.replace(found, label=label)
    base, _, features = name.partition("_")
    if base in _FEATURES and features.startswith(("classifier", "inception")):
        found = _FEATURES[base]
        return dataclasses.replace(found, label=f"{found.label or base}-{features}")
    for ending in (*_DETAILS, *_VARIANTS):
        stem = name.removesuffix(ending)
        if stem != name and (stem in METRICS or stem in _FEATURES):
            found = METRICS.get(stem) or _FEATURES[stem]
            return dataclasses.replace(found, label=label, protocol="")
    unit = next((u for ending, u in _UNIT_OF_ENDING.items() if name.endswith(ending)), "")
    return Metric(label, unit)


def is_fraction(key: str) -> bool:
    """Return whether a metric lies between 0 and 1."""
    return find_metric(key).unit == FRACTION


def higher_is_better(key: str) -> bool | None:
    """Return whether a higher value is better, a lower one (False), or neither (None)."""
    direction = find_metric(key).direction
    return None if direction is None else direction == "max"
