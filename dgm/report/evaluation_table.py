"""What `evaluation.json` holds, in words and in a table on the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from dgm.metrics import is_fraction
from dgm.report.formatting import figure
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
    "discretization_error": "estimated discretisation error",
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
    "inception_score": "sure and various classes; higher is better",
    "fd": "Frechet distance in features of the own net, no FID; 0 is equal",
    "kd": "kernel distance in features of the own net, no KID; 0 is equal",
    "score": "as the Inception score, by the own net's classes; higher is better",
    "precision": "generated images that look real",
    "recall": "real images that are like a generated one",
    "density": "how closely generated images lie to real ones; 1 is as real ones",
    "coverage": "real images with a generated one near; 97 % is as real ones",
    "class_consistency": "generated images in which the class asked for is seen",
    "classifier_accuracy_on_real_test_images": "the judge's own, the most to expect",
    "diversity": "distance between images of a class over that of real ones; 1 is as various",
    "least_diversity_of_a_class": "0 is one and the same image",
    "coverage_of_classes": "the mean of classes; 97 % is as real ones",
    "least_coverage_of_a_class": "a class that is left out has 0",
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
    "ssim": "likeness of structure; 1 is perfect",
    "seconds_per_image": "to make one, as sample.* of the run says",
}
_OF_SETS = ("fd", "kd", "score", "precision", "recall", "density", "coverage")
_ABOUT = ("checkpoint", "images_seen")


def label(name: str) -> str:
    """Write the name of a figure as people do: fd_cifar as FD-cifar."""
    base, suffix = _split(name)
    return _LABELS.get(base, base.replace("_", " ")) + (f"-{suffix}" if suffix else "")


def note(name: str) -> str:
    """Say in a few words what a figure is; empty where its name says it."""
    return _NOTES.get(_split(name)[0], "")


def shown(name: str, found: dict[str, Any]) -> str:
    """Write a figure of a measure, with its spread over seeds."""
    text, spreads = figure(name, found[name]), found.get(SPREAD, {})
    spread = spreads.get(name) if isinstance(spreads, dict) else None
    if not isinstance(spread, int | float):
        return text
    share = is_fraction(name)
    return f"{text} ± {100 * spread if share else spread:.2g}{' %' * share}"


def _split(name: str) -> tuple[str, str]:
    base, _, suffix = name.partition("_")
    of_net = suffix.startswith(("cifar", "inception"))
    return (base, suffix) if base in _OF_SETS and of_net else (name, "")


def table(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lay out the figures of runs side by side, line by line; what is the same for all once."""
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    wide = max(18, *(len(name) + 2 for name in runs))
    yield _line("", list(runs), wide)
    yield _line("images seen", [f"{found['images_seen']:,}" for found in runs.values()], wide)
    for name in names:
        if name not in _ABOUT:
            found = [run.get(name, {}) for run in runs.values()]
            yield from ("", name.replace("_", " "), *_rows(found, wide))


def _rows(found: list[dict[str, Any]], wide: int) -> Iterator[str]:
    names = list(dict.fromkeys(name for measure in found for name in measure))
    names = [name for name in names if not _is_list(name, found)]
    told = [name for name in names if _is_setting(name, found) and _alike(name, found)]
    first = "; ".join(f"{label(name)} {_cell(name, found[0][name])}" for name in told)
    yield from textwrap.wrap(first, 100, initial_indent="  ", subsequent_indent="  ")
    for name in (name for name in names if name not in told):
        parts = [value if isinstance(value := m.get(name), dict) else {} for m in found]
        if any(parts):
            yield f"  {label(name)}" + (f": {note(name)}" if note(name) else "")
            for part in dict.fromkeys(part for own in parts for part in own):
                yield _line(f"    {part}", [_cell(name, own.get(part)) for own in parts], wide)
        else:
            cells = [shown(name, m) if name in m else "–" for m in found]
            yield _line(f"  {label(name)}", cells, wide, note(name))


def _is_list(name: str, found: list[dict[str, Any]]) -> bool:
    return name == SPREAD or any(isinstance(measure.get(name), list) for measure in found)


def _is_setting(name: str, found: list[dict[str, Any]]) -> bool:
    values = [measure[name] for measure in found if name in measure]
    return not is_detail(name) and all(isinstance(value, int | str) for value in values)


def _alike(name: str, found: list[dict[str, Any]]) -> bool:
    return len({str(measure.get(name)) for measure in found}) == 1


def _cell(name: str, value: object) -> str:
    return "–" if value is None else figure(name, value)


def _line(first: str, cells: list[str], wide: int, note: str = "") -> str:
    return (
        f"{first:40}" + "".join(f" {cell:>{wide - 1}}" for cell in cells) + f"  {note}"
    ).rstrip()
