"""Measure a trained run: `python launch/evaluate.py runs/small-shapes`.

Class consistency: a classifier that training never saw is trained on the real images and asked
which class it sees in generated ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from dgm.errors import UserError
from dgm.eval.classifier import classify, train_classifier
from dgm.images import to_uint8
from dgm.train.engine import Engine
from dgm.train.sampling import sample_on_all
from launch.command import parse_options, run
from launch.trained import Trained, open_trained
from shards.build import ensure
from shards.read import Shards, open_shards


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = ArgumentParser(exit_on_error=False, description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--per_class", type=int, default=50, help="generated images of each class")
    parser.add_argument("--epochs", type=int, default=3, help="of the classifier's training")
    parser.add_argument("--seed", type=int, default=1, help="of classifier and images")
    parser.add_argument("--test_shards", help="real images to test the classifier on")
    return parser


def generate(trained: Trained, per_class: int, seed: int, engine: Engine) -> tuple[np.ndarray, ...]:
    """Make images of every class as the run's `sample` section says: pixels and labels asked."""
    nets = {name: net.to(engine.device) for name, net in trained.nets.items()}
    labels = torch.arange(len(trained.classes)).repeat_interleave(per_class)
    index = torch.arange(len(labels))
    made = sample_on_all(engine, trained.objective, nets, index, labels, seed)
    return to_uint8(made), labels.numpy()


def measure(options: Namespace, engine: Engine) -> dict[str, object]:
    """Train the classifier on the run's own data and let it judge real and generated images."""
    if options.per_class < 1 or options.epochs < 1:
        raise UserError(
            f"--per_class {options.per_class}, --epochs {options.epochs}: choose 1 or more"
        )
    trained = open_trained(Path(options.run))
    settings = yaml.safe_load((Path(options.run) / "config.yaml").read_text())["data"]
    real = open_shards(settings["shards"])
    test = open_test_images(settings["source"], settings["resize"], options.test_shards)
    net = train_classifier(real, real.num_classes, options.epochs, options.seed, engine.device)
    index = np.arange(len(test))
    on_real = float((classify(net, test.images(index)) == test.labels(index)).mean())
    pixels, asked = generate(trained, options.per_class, options.seed, engine)
    hits = classify(net, pixels) == asked
    by_class = {
        name: float(hits[asked == label].mean()) for label, name in enumerate(trained.classes)
    }
    return {
        "images_seen": trained.images_seen,
        "classifier_accuracy_on_real_test_images": on_real,
        "num_generated": len(hits),
        "class_consistency": float(hits.mean()),
        "class_consistency_by_class": by_class,
    }


def open_test_images(source: str, resize: int | None, shards: str | None) -> Shards:
    """Open the test split of a source, built where missing, or the shards named."""
    return open_shards(ensure(source, shards, split="test", resize=resize))


def main() -> None:
    """Measure by the command line: a table on screen, JSON in the run folder."""
    options = parse_options(make_parser(), sys.argv[1:])
    engine = Engine("no")
    try:
        found = measure(options, engine)
        if engine.is_main:
            path = Path(options.run) / "evaluation.json"
            path.write_text(json.dumps(found, indent=1) + "\n")
            for name, value in found.items():
                if isinstance(value, dict):
                    for kind, share in value.items():
                        print(f"  {kind:20} {share:.1%}")
                else:
                    shown = f"{value:.2%}" if isinstance(value, float) else f"{value:,}"
                    print(f"{name:42} {shown}")
            print(f"written to {path}")
    finally:
        engine.close()


if __name__ == "__main__":
    run(main)
