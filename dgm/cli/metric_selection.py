"""Which metrics are computed for a run, and whether there are enough images for them."""

from __future__ import annotations

import itertools

import numpy as np

from dgm.cli.eval_context import EvalContext
from dgm.cli.metric_groups import METRIC_GROUPS
from dgm.common.errors import UserError
from dgm.common.suggestions import did_you_mean
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.ode import check_timesteps
from dgm.evaluation.diversity import MIN_REAL_IMAGES
from dgm.evaluation.online_eval import require_likelihood
from dgm.objective import ImportanceWeighted, Likelihood

# Names of published metrics, and of single ones of a group, by the options that compute them.
_OPTIONS_OF = {
    "--metrics distances --features inception": "fid kid is inception_score isc fid50k",
    "--metrics distances": "fd kd score",
    "--metrics precision_recall": "precision recall pr prc prdc density coverage",
    "--metrics bits_per_dim": "bpd nll likelihood log_likelihood elbo",
    "--metrics reconstruction": "psnr psnr_db ssim mse active_latents",
    "--metrics class_consistency": "accuracy cas",
    "--metrics cost": "seconds_per_image num_parameters",
    "--metrics memorization": "neighbours neighbors nearest_neighbours nearest_neighbors",
}
_PUBLISHED = {name: options for options, names in _OPTIONS_OF.items() for name in names.split()}


def choose_metrics(context: EvalContext) -> list[str]:
    """Return the metrics of --metrics, or by default those that suit the run's family.

    Raise UserError for a metric that the run does not support, or for too few images.
    """
    trained, text = context.trained, context.options.metrics
    if text is None:
        # A diffusion model's bounds take at least one pass through the net per timestep.
        by_family = {
            "diffusion": ["loss_by_timestep"], "gan": [], "vae": ["reconstruction", "bits_per_dim"],
        }  # fmt: skip
        has_likelihood = isinstance(trained.objective, Likelihood)
        likelihood = by_family.get(trained.family, ["bits_per_dim"] * has_likelihood)
        names = ["distances", "precision_recall", "diversity", "memorization", *likelihood]
        names = _without_test(context, ["class_consistency"] * context.class_conditional + names)
    else:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in METRIC_GROUPS:
            raise UserError(f"--metrics names '{name}': {suggest_metric(name)}")
        _check_family(context, name)
        _check_counts(context, name)
    if "bits_per_dim_ode" in names and isinstance(trained.objective, DiffusionObjective):
        check_timesteps(trained.objective.schedule.num_timesteps)
    if "class_consistency" in names and not context.class_conditional:
        raise UserError(
            "--metrics is class_consistency, but the run was trained without classes: "
            "choose diversity"
        )
    if "bits_per_dim" in names:
        require_likelihood(trained.objective, "--metrics", "distances")
    samples = context.options.importance_samples
    if samples and not isinstance(trained.objective, ImportanceWeighted):
        raise UserError(
            f"--importance_samples is {samples}, but a {trained.family} run has no "
            "importance-weighted bound: leave it out"
        )
    # Opened now, so that a missing file is an error before anything is computed.
    groups = [METRIC_GROUPS[name] for name in names]
    if context.options.test_shards is not None or any(group.on_test for group in groups):
        _ = context.test
    if context.options.features == "inception" and any(group.by_features for group in groups):
        _ = context.extractor
    return names


def _without_test(context: EvalContext, names: list[str]) -> list[str]:
    """Leave out metrics on test images, with a message, if there are none."""
    reason = context.why_no_test
    if reason is None or context.options.against == "test":
        return names
    left_out = [name for name in names if METRIC_GROUPS[name].on_test]
    if context.engine.is_main:
        listed = ", ".join(left_out)
        print(f"{context.folder}: left out: {listed}, for lack of test images: {reason}")
    return [name for name in names if name not in left_out]


def suggest_metric(name: str) -> str:
    """Return the remedy for an unknown name."""
    plain = name.lower().replace("-", "_").removesuffix("_classifier").removesuffix("_inception")
    if options := _PUBLISHED.get(plain):
        return f"give {options}"
    return f"{did_you_mean(name, METRIC_GROUPS)}choose from {', '.join(METRIC_GROUPS)}"


def refuse_published_names(words: list[str]) -> None:
    """Raise UserError if a published name such as FID is an option, or a value of a wrong one."""
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        value = value if equals else following
        name = option.removeprefix("--").lower()
        if option in ("--metric", "--measure", "--features") and value.lower() in _PUBLISHED:
            raise UserError(f"{option} is {value}: give {_PUBLISHED[value.lower()]}")
        if option.startswith("--") and name in _PUBLISHED:
            raise UserError(f"{option} is not an option: give {_PUBLISHED[name]}")


def _check_family(context: EvalContext, name: str) -> None:
    """Raise UserError if only another family has the metrics."""
    family, own = METRIC_GROUPS[name].family, context.trained.family
    if family in (None, own):
        return
    names = [other for other, group in METRIC_GROUPS.items() if group.family == family]
    raise UserError(
        f"{context.folder} holds a {own} run, but {name} is a metric of {family} runs: "
        f"leave {' and '.join(names)} out of --metrics"
    )


def _check_counts(context: EvalContext, name: str) -> None:
    """Raise UserError if there are too few generated or real images."""
    group = METRIC_GROUPS[name]
    min_images = group.min_images
    if name in ("class_consistency", "diversity"):
        min_images *= len(context.classes)
    if context.num_images < min_images:
        raise UserError(
            f"{context.num_images} generated images are too few for {name}: "
            f"give --num_images {min_images} or more"
        )
    if not group.by_features:
        return
    data = context.reference
    if len(data) < MIN_REAL_IMAGES:
        raise UserError(
            f"{data.folder} holds {len(data)} images, too few for {name}: it needs "
            f"{MIN_REAL_IMAGES} or more"
        )
    if name == "diversity":
        labels = data.labels(np.arange(len(data)))
        present = np.flatnonzero(context.counts)
        counts = np.bincount(labels, minlength=data.num_classes)[present]
        if counts.min() < MIN_REAL_IMAGES:
            raise UserError(
                f"{data.folder} holds {counts.min()} images of class "
                f"{data.classes[present[counts.argmin()]]}, too few for diversity: it needs "
                f"{MIN_REAL_IMAGES} or more of each; else leave it out of --metrics"
            )
