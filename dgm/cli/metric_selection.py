"""Which measures a run is given, and whether there are images enough for them."""

from __future__ import annotations

import itertools

import numpy as np

from dgm.cli.eval_context import Subject
from dgm.cli.sample_metrics import MEASURES
from dgm.common.errors import UserError
from dgm.common.suggestions import did_you_mean
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.ode import check_timesteps
from dgm.evaluation.diversity import LEAST_REAL
from dgm.evaluation.online_eval import has_likelihood
from dgm.objective import ImportanceWeighted

_BY_INCEPTION = "--measure distances --features inception"
_OVERLAP = "--measure precision_recall"
_BITS = "--measure bits_per_dim"
# Names of published figures, by the options that measure them.
_PUBLISHED = {
    **dict.fromkeys(("fid", "kid", "is", "inception_score", "isc", "fid50k"), _BY_INCEPTION),
    **dict.fromkeys(("precision", "recall", "pr", "prc", "prdc", "density", "coverage"), _OVERLAP),
    **dict.fromkeys(("bpd", "nll", "likelihood", "log_likelihood", "elbo"), _BITS),
    **dict.fromkeys(("psnr", "ssim", "mse"), "--measure reconstruction"),
    **dict.fromkeys(("accuracy", "cas"), "--measure class_consistency"),
}


def choose_measures(subject: Subject) -> list[str]:
    """Choose what suits the run; raises UserError where it cannot be measured as wanted."""
    trained, wanted = subject.trained, subject.options.measure
    by_class = trained.objective.num_classes is not None
    if wanted is None:
        # A diffusion model's bounds take a pass through the net for each timestep, and more.
        by_family = {
            "diffusion": ["loss_by_timestep"], "gan": [], "vae": ["reconstruction", "bits_per_dim"],
        }  # fmt: skip
        likelihood = by_family.get(trained.family, ["bits_per_dim"])
        names = ["distances", "precision_recall", "diversity", "neighbours", *likelihood]
        names = _without_test(subject, ["class_consistency"] * by_class + names)
    else:
        names = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in names:
        if name not in MEASURES:
            raise UserError(f"--measure names '{name}': {hint_at_measure(name)}")
        _check_family(subject, name)
        _check_counts(subject, name)
    if "bits_per_dim_ode" in names and isinstance(trained.objective, DiffusionObjective):
        check_timesteps(trained.objective.schedule.num_timesteps)
    if "class_consistency" in names and not by_class:
        raise UserError(
            "--measure is class_consistency, but the run was trained without classes: "
            "choose diversity"
        )
    if "bits_per_dim" in names:
        has_likelihood(trained.objective, "--measure", "distances")
    samples = subject.options.importance_samples
    if samples and not isinstance(trained.objective, ImportanceWeighted):
        raise UserError(
            f"--importance_samples is {samples}, but a {trained.family} run has no closer "
            "bound: leave it out"
        )
    _open_what_may_be_missing(subject, names)
    return names


def _without_test(subject: Subject, names: list[str]) -> list[str]:
    """Leave out what is measured on test images where there are none, and say so."""
    why = subject.lacks_test
    if why is None or subject.options.against == "test":
        return names
    left_out = [name for name in names if MEASURES[name].on_test]
    if subject.engine.is_main:
        print(f"{subject.folder}: not measured: {', '.join(left_out)}, on test images: {why}")
    return [name for name in names if name not in left_out]


def hint_at_measure(name: str) -> str:
    """Return what to give instead of a name that is no measure."""
    if option := _PUBLISHED.get(name.lower().replace("-", "_")):
        return f"give {option}"
    return f"{did_you_mean(name, MEASURES)}choose of {', '.join(MEASURES)}"


def refuse_published_names(words: list[str]) -> None:
    """Raise UserError where FID or another published name is asked for as an option."""
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        asked = value if equals else following
        name = option.removeprefix("--").lower()
        if option in ("--metric", "--metrics", "--features") and asked.lower() in _PUBLISHED:
            raise UserError(f"{option} is {asked}: give {_PUBLISHED[asked.lower()]}")
        if option.startswith("--") and name in _PUBLISHED:
            raise UserError(f"{option} is no option: give {_PUBLISHED[name]}")


def _open_what_may_be_missing(subject: Subject, names: list[str]) -> None:
    """Open now what a measure would open only after others have taken their time."""
    if subject.options.test_shards is not None or any(MEASURES[n].on_test for n in names):
        _ = subject.test
    if subject.options.features == "inception" and any(MEASURES[n].by_features for n in names):
        _ = subject.features


def _check_family(subject: Subject, name: str) -> None:
    """Raise UserError where only another family has what is measured."""
    family, own = MEASURES[name].of_family, subject.trained.family
    if family in (None, own):
        return
    lacks = {"diffusion": "timesteps", "vae": "encoder whose means are decoded again"}[family]
    names = [other for other, measure in MEASURES.items() if measure.of_family == family]
    raise UserError(
        f"{subject.folder} holds a {own} run, which has no {lacks}: "
        f"leave {' and '.join(names)} out of --measure"
    )


def _check_counts(subject: Subject, name: str) -> None:
    """Raise UserError where generated or real images are too few for a measure."""
    least = MEASURES[name].least
    if name in ("class_consistency", "diversity"):
        least *= len(subject.classes)
    if subject.num_images < least:
        raise UserError(
            f"{subject.num_images} generated images are too few for {name}: "
            f"give --num_images {least} or more"
        )
    if not MEASURES[name].by_features:
        return
    data = subject.test if subject.options.against == "test" else subject.real
    if len(data) < LEAST_REAL:
        raise UserError(
            f"{data.folder} holds {len(data)} images, too few for {name}: {LEAST_REAL} are the "
            "least to compare with"
        )
    if name == "diversity":
        labels = data.labels(np.arange(len(data)))
        needed = np.flatnonzero(subject.counts)
        counts = np.bincount(labels, minlength=data.num_classes)[needed]
        if counts.min() < LEAST_REAL:
            raise UserError(
                f"{data.folder} holds {counts.min()} images of class "
                f"{data.classes[needed[counts.argmin()]]}, too few for diversity: {LEAST_REAL} of "
                "each are the least, else leave it out of --measure"
            )
