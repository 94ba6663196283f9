"""Names, notes, units and formatting of metrics; the table of `evaluation.json` on the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from dgm.common.formatting import number, percent
from dgm.metrics import is_fraction
from dgm.report.read_run import SPREAD, is_detail

_LABELS = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "Inception score",
    "fd": "FD",
    "kd": "KD",
    "eps_mse": "squared error of eps",
    "loss": "loss",
    "exact": "bits/dim, exact for dequantised data",
    "bound": "bits/dim, bound",
    "importance_weighted": "bits/dim, closer bound",
    "error": "standard error of it",
    "discretization_error": "estimated discretization error",
    "loss_error": "standard error of the loss",
    "eps_mse_error": "standard error of that of eps",
    "rms_error_grey_levels": "error in grey levels",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "active_latents": "fraction of latent dimensions that are active",
    "num_active": "number of active latent dimensions",
    "num_parameters": "parameters",
    "seconds_per_image": "seconds for an image",
}
_NOTES = {
    "fid": "Frechet distance in Inception's features; 0 is equal",
    "kid": "kernel distance in Inception's features; 0 is equal",
    "inception_score": "confident predictions, varied classes; higher is better",
    "fd": "Frechet distance in features of the own net, no FID; 0 is equal",
    "kd": "kernel distance in features of the own net, no KID; 0 is equal",
    "score": "as the Inception score, by the own net's classes; higher is better",
    "precision": "generated images that look real",
    "recall": "real images that resemble a generated one",
    "density": "how close generated images are to real ones; 1 is as real ones",
    "coverage": "real images with a generated one near; 97 % is as real ones",
    "class_consistency": "generated images classified as the requested class",
    "classifier_accuracy_on_real_test_images": "of the classifier itself, the upper limit",
    "diversity": "distance between images of a class over that of real ones; 1 is as diverse",
    "least_diversity_of_a_class": "0 is one and the same image",
    "coverage_of_classes": "mean over classes; 97 % is as real ones",
    "least_coverage_of_a_class": "0 is a class that is never generated",
    "share_by_class": "of the generated images",
    "distance_in_features": "median, to the nearest training image",
    "distance_in_pixels": "the same in grey levels, root of the mean square",
    "ratio_in_features": "over that of test images; 1 is as new, 0 is a copy",
    "ratio_in_pixels": "over that of test images; 1 is as new, 0 is a copy",
    "nearer_than_test_in_features": "than all but 1 % of test images; 1 % is as new",
    "nearer_than_test_in_pixels": "than all but 1 % of test images; 1 % is as new",
    "exact": "on average over the noise a bound for stored images",
    "active_latents": "variance of the posterior mean over images above 0.01 (Burda et al. 2016)",
    "loss": "of test images, as in training; lower is better",
    "eps_mse": "of test images, whatever the net predicts",
    "rms_error_grey_levels": "of reconstructions, root of the mean square; 0 is perfect",
    "psnr_db": "the same in decibels; higher is better",
    "ssim": "structural similarity; 1 is perfect",
    "seconds_per_image": "to generate one, with sample.* of the run",
}
_UNITS = {
    "images_per_s": "images/s",
    "bits_per_dim": "bits per dimension",
    "_s": "s",
    "_gib": "GiB",
}
_WITH_FEATURES = ("fd", "kd", "score", "precision", "recall", "density", "coverage")
_HEADER_KEYS = ("checkpoint", "images_seen")


def label(name: str) -> str:
    """Return the name of a metric as it is displayed: fd_cifar as FD-cifar."""
    base, features = _split(name)
    return _LABELS.get(base, base.replace("_", " ")) + (f"-{features}" if features else "")


def note(name: str) -> str:
    """Return what a metric measures, in a few words; empty where its name is enough."""
    return _NOTES.get(_split(name)[0], "")


def unit(key: str) -> str:
    """Return the unit of a metric, or its name where it has none."""
    last = key.split("/")[-1]
    known = next((unit for part, unit in _UNITS.items() if part in last), None)
    return known or {"lr": "learning rate", "grad_norm": "norm"}.get(last, last.replace("_", " "))


def format_metric(name: str, value: object) -> str:
    """Return the value of a metric as text: fractions in percent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return percent(value) if is_fraction(name) else number(value)


def format_with_spread(name: str, found: dict[str, Any]) -> str:
    """Return a metric of `found` as text, with its standard deviation over seeds."""
    text, spreads = format_metric(name, found[name]), found.get(SPREAD, {})
    spread = spreads.get(name) if isinstance(spreads, dict) else None
    if not isinstance(spread, int | float):
        return text
    fraction = is_fraction(name)
    return f"{text} ± {100 * spread if fraction else spread:.2g}{' %' * fraction}"


def _split(name: str) -> tuple[str, str]:
    base, _, suffix = name.partition("_")
    known = base in _WITH_FEATURES and suffix.startswith(("cifar", "inception"))
    return (base, suffix) if known else (name, "")


def table(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of runs side by side; settings that all share appear once."""
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    width = max(18, *(len(name) + 2 for name in runs))
    yield _line("", list(runs), width)
    yield _line("images seen", [f"{found['images_seen']:,}" for found in runs.values()], width)
    for name in names:
        if name not in _HEADER_KEYS:
            found = [run.get(name, {}) for run in runs.values()]
            yield from ("", name.replace("_", " "), *_rows(found, width))


def _rows(found: list[dict[str, Any]], width: int) -> Iterator[str]:
    names = list(dict.fromkeys(name for measure in found for name in measure))
    names = [name for name in names if not _is_list(name, found)]
    shared = [name for name in names if _is_shared_setting(name, found)]
    first = "; ".join(f"{label(name)} {_cell(name, found[0][name])}" for name in shared)
    yield from textwrap.wrap(first, 100, initial_indent="  ", subsequent_indent="  ")
    for name in (name for name in names if name not in shared):
        parts = [value if isinstance(value := m.get(name), dict) else {} for m in found]
        if any(parts):
            yield f"  {label(name)}" + (f": {note(name)}" if note(name) else "")
            for part in dict.fromkeys(part for own in parts for part in own):
                yield _line(f"    {part}", [_cell(name, own.get(part)) for own in parts], width)
        else:
            cells = [format_with_spread(name, m) if name in m else "–" for m in found]
            yield _line(f"  {label(name)}", cells, width, note(name))


def _is_list(name: str, found: list[dict[str, Any]]) -> bool:
    return name == SPREAD or any(isinstance(measure.get(name), list) for measure in found)


def _is_shared_setting(name: str, found: list[dict[str, Any]]) -> bool:
    values = [measure[name] for measure in found if name in measure]
    plain = not is_detail(name) and all(isinstance(value, int | str) for value in values)
    return plain and len({str(measure.get(name)) for measure in found}) == 1


def _cell(name: str, value: object) -> str:
    return "–" if value is None else format_metric(name, value)


def _line(first: str, cells: list[str], width: int, note: str = "") -> str:
    return (
        f"{first:40}" + "".join(f" {cell:>{width - 1}}" for cell in cells) + f"  {note}"
    ).rstrip()
