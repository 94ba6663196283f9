"""Measure a trained run: `python launch/evaluate.py runs/small-shapes`.

class_consistency: how often a classifier, trained on the real images, sees in generated images the
class that was asked for. fd_classifier: the Frechet distance between real and generated images in
that classifier's features. bits_per_dim: of the test images, exact or a bound.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from dgm.errors import UserError
from dgm.eval.classifier import Classifier, cached_classifier, classify
from dgm.eval.during import enough_epochs, fd_classifier, has_likelihood, moments_of_all
from dgm.eval.likelihood import bits_per_dim
from dgm.images import to_uint8
from dgm.objective import ImportanceWeighted
from dgm.rng import permutation
from dgm.train.engine import Engine
from dgm.train.run_folder import write_whole
from dgm.train.sampling import sample_on_all
from launch.command import parse_options, run
from launch.sample import choose_checkpoint
from launch.trained import Trained, open_trained
from launch.training import identify
from shards.build import ensure
from shards.folders import cache_root
from shards.read import Shards, open_shards


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = ArgumentParser(exit_on_error=False, description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--measure", help=f"of {', '.join(MEASURES)}, with commas; default by run")
    parser.add_argument("--checkpoint", help="its images seen, or best; default the newest")
    parser.add_argument("--per_class", type=int, default=50, help="generated images of each class")
    parser.add_argument("--num_test", type=int, help="test images for bits_per_dim; default all")
    parser.add_argument(
        "--importance_samples",
        type=int,
        default=0,
        help="of a vae's closer bound; default none",
    )
    parser.add_argument("--epochs", type=int, help="of the classifier; default until 20,000 images")
    parser.add_argument("--seed", type=int, default=1, help="of classifier and images")
    parser.add_argument("--test_shards", help="real images to test on; default as the run's source")
    return parser


@dataclass
class Subject:
    """A trained run and the real images it is measured against."""

    options: Namespace
    engine: Engine
    trained: Trained
    real: Shards
    settings: dict[str, Any]  # the run's `data` section

    @cached_property
    def nets(self) -> dict[str, torch.nn.Module]:
        """Give the nets on the device."""
        return {name: net.to(self.engine.device) for name, net in self.trained.nets.items()}

    @cached_property
    def test(self) -> Shards:
        """Open the test images, built where missing."""
        source, resize = self.settings["source"], self.settings["resize"]
        shards = self.options.test_shards or self.settings.get("test_shards")
        where = self.engine.on_main(
            lambda: str(ensure(source, shards, split="test", resize=resize))
        )
        return open_shards(where)

    @cached_property
    def classifier(self) -> Classifier:
        """Give the classifier of the real images, trained once for a data set."""
        return cached_classifier(
            self.engine, cache_root(), self.real, identify(self.real), self.real.num_classes,
            self.options.epochs or enough_epochs(self.real), self.options.seed,
        )  # fmt: skip


def class_consistency(subject: Subject) -> dict[str, Any]:
    """Ask the classifier which classes it sees in generated images."""
    options, trained = subject.options, subject.trained
    labels = torch.arange(len(trained.classes)).repeat_interleave(options.per_class)
    index = torch.arange(len(labels))
    made = sample_on_all(
        subject.engine, trained.objective, subject.nets, index, labels, options.seed
    )
    hits = classify(subject.classifier, to_uint8(made)) == labels.numpy()
    rows = np.arange(len(subject.test))
    right = classify(subject.classifier, subject.test.images(rows)) == subject.test.labels(rows)
    return {
        "classifier_accuracy_on_real_test_images": float(right.mean()),
        "num_generated": len(hits),
        "class_consistency": float(hits.mean()),
        "class_consistency_by_class": {
            name: float(hits[labels.numpy() == label].mean())
            for label, name in enumerate(trained.classes)
        },
    }


def frechet(subject: Subject) -> dict[str, Any]:
    """Measure the distance of generated images from the real train images."""
    count = subject.options.per_class * len(subject.trained.classes)
    wanted = moments_of_all(subject.classifier, subject.real)
    distance = fd_classifier(
        subject.engine, subject.trained.objective, subject.nets, subject.classifier, wanted,
        len(subject.trained.classes), count,
    )  # fmt: skip
    return {"num_compared": count, "fd_classifier": distance}


def bits(subject: Subject) -> dict[str, Any]:
    """Measure bits per dimension of test images, with their terms."""
    objective = has_likelihood(subject.trained.objective, "--measure")
    seed = subject.options.seed
    index = permutation(seed, 0, len(subject.test))[: subject.options.num_test]
    samples = subject.options.importance_samples
    if samples and not isinstance(objective, ImportanceWeighted):
        raise UserError(
            f"--importance_samples is {samples}, but a {subject.trained.family} run has no closer "
            "bound: leave it out"
        )
    found = bits_per_dim(
        subject.engine, objective, subject.nets, subject.test, index, seed,
        importance_samples=samples,
    )  # fmt: skip
    counts = {"num_test_images": len(index), "importance_samples": samples}
    return {**counts, "bits_per_dim": found}


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "class_consistency": class_consistency,
    "fd_classifier": frechet,
    "bits_per_dim": bits,
}


def choose_measures(wanted: str | None, trained: Trained) -> list[str]:
    """Choose what suits the run; raises UserError where it cannot be measured as wanted."""
    by_class = trained.objective.num_classes is not None
    if wanted is None:
        # A diffusion model's bound takes a pass through the net for each timestep.
        by_family = {"diffusion": [], "gan": ["fd_classifier"]}
        chosen = by_family.get(trained.family, ["bits_per_dim"])
        return ["class_consistency"] * by_class + chosen
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in MEASURES:
            raise UserError(f"--measure names '{name}': choose of {', '.join(MEASURES)}")
    if "class_consistency" in names and not by_class:
        raise UserError(
            "--measure is class_consistency, but the run was trained without classes: "
            "choose fd_classifier"
        )
    if "bits_per_dim" in names:
        has_likelihood(trained.objective, "--measure")
    return names


def measure(options: Namespace, engine: Engine) -> dict[str, Any]:
    """Measure what was asked for."""
    for name in ("per_class", "epochs", "num_test"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name} is {options[name]}: choose 1 or more")
    if options.importance_samples < 0:
        raise UserError(f"--importance_samples is {options.importance_samples}: choose 0 or more")
    trained = open_trained(Path(options.run), choose_checkpoint(options.checkpoint))
    names = choose_measures(options.measure, trained)
    settings = yaml.safe_load((Path(options.run) / "config.yaml").read_text())["data"]
    subject = Subject(options, engine, trained, open_shards(settings["shards"]), settings)
    found: dict[str, Any] = {"images_seen": trained.images_seen}
    for name in names:
        found |= MEASURES[name](subject)
    return found


def show(found: dict[str, Any], indent: str = "", share: bool = False) -> None:
    """Print figures as a table; shares in percent."""
    for name, value in found.items():
        percent = share or "consistency" in name or "accuracy" in name
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ", percent)
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            print(f"{indent + name:42} {f'{value:.2%}' if percent else shown}")


def main() -> None:
    """Measure by the command line: a table on screen, JSON in the run folder."""
    options = parse_options(make_parser(), sys.argv[1:])
    engine = Engine("no")
    try:
        found = measure(options, engine)
        if engine.is_main:
            path = Path(options.run) / "evaluation.json"
            write_whole(path, json.dumps(found, indent=1) + "\n")
            show(found)
            print(f"written to {path}")
    finally:
        engine.close()


if __name__ == "__main__":
    run(main)
