"""Walks through what a trained run has learned, and trials of its settings."""

from __future__ import annotations

from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dgm.cli.assemble import identify
from dgm.cli.eval_context import Subject
from dgm.common.atomic_dirs import cache_root
from dgm.common.errors import UserError
from dgm.diffusion.objective import DiffusionObjective
from dgm.evaluation import latent_traversal
from dgm.evaluation.class_labels import is_balanced, labels_by_frequency, uniform_labels
from dgm.evaluation.classifier import to_input
from dgm.evaluation.feature_cache import describe_real
from dgm.evaluation.features import of_classifier
from dgm.evaluation.image_similarity import psnr
from dgm.evaluation.sampler_sweep import Judge, try_settings
from dgm.evaluation.subset import in_turn
from dgm.latent_space import along_directions, along_line, along_sphere
from dgm.objective import Encoder, Latent
from dgm.preprocessing import STANDARD
from dgm.rng import Draws, permutation
from dgm.vae.objective import VAEObjective

COLUMNS = 11  # of a walk
REACH = 3.0  # standard deviations of the prior, either way
DIRECTIONS = 8
POINTS = 4  # latents about which directions are sought
Explored = tuple[dict[str, Any], Tensor]  # figures, and a sheet [rows, columns, C, H, W]


class Explorer:
    """A trained run, and where to begin walks in it."""

    def __init__(self, subject: Subject):
        """Choose test images: classes in turn, or pairs of a class where the net is told them."""
        self.subject, self.engine = subject, subject.engine
        self.objective = cast(Latent, subject.trained.objective)
        self.by_class = subject.trained.objective.num_classes is not None
        self.encodes = isinstance(self.objective, Encoder)
        options = subject.options
        labels = subject.test.labels(np.arange(len(subject.test)))
        run = 2 if self.by_class else 1
        self.ends = torch.from_numpy(in_turn(labels, 2 * options.num_pairs, options.seed, run))
        if len(self.ends) < 2:
            raise UserError(
                f"{options.test_shards or 'the test images'} hold {len(labels)} images, too few "
                "to walk between: choose others by --test_shards"
            )

    def interpolate(self) -> Explored:
        """Walk from image to image, or, where there is no encoder, from latent to latent."""
        subject = self.subject
        z, labels = self._begin(len(self.ends) // 2 * 2)
        # A flow's latents keep all of an image, and between two of them a sphere's arc goes where
        # no image lies; Kingma and Dhariwal 2018 (section 6) take the line.
        path = subject.options.path or ("line" if subject.trained.family == "flow" else "sphere")
        way = {"line": along_line, "sphere": along_sphere}[path]
        rows = self._decode(way(z[0::2], z[1::2], COLUMNS), labels[0::2])
        even: list[dict[str, Any]] = [*latent_traversal.smoothness(subject.classifier, rows)]
        between = "test images" if self.encodes else "latents"
        found: dict[str, Any] = {"between": between, "along": path}
        for name in ("mean_step", "largest_over_mean"):
            found[name] = fmean(row[name] for row in even)
        if self.encodes or self.by_class:
            names = [subject.trained.classes[int(label)] for label in labels]
            ends = zip(names[0::2], names[1::2], strict=True)
            even = [{"from": a, "to": b, **row} for (a, b), row in zip(ends, even, strict=True)]
        found["rows"] = even
        if self.encodes:
            real = to_input(subject.test.images(self.ends[: len(z)].numpy()), self.engine.device)
            ends_made = torch.stack([rows[:, 0], rows[:, -1]], dim=1).flatten(0, 1)
            found["psnr_db_of_ends"] = float(
                psnr(STANDARD.to_levels(ends_made), STANDARD.to_levels(real)).mean()
            )
            rows = torch.cat([real[0::2, None], rows, real[1::2, None]], dim=1)
        return found, rows

    def traverse(self) -> Explored | None:
        """Walk along single latents of a VAE, or where images of a flow or GAN change most."""
        subject, objective = self.subject, self.objective
        if isinstance(objective, DiffusionObjective):
            return None
        z, labels = self._begin(POINTS)
        # About full latents a flow's images change most where they break: at the temperature of its
        # samples they change as images do.
        flow = subject.trained.family == "flow"
        held = subject.trained.objective.sample_config.temperature if flow else 1.0
        z, reach = held * z, held * REACH
        count = min(DIRECTIONS, z.shape[1])
        if isinstance(objective, VAEObjective):
            moved, directions, rows = self._by_kl(objective, z, count)
        else:
            moved = "directions in which images change most"
            moved += f", at temperature {held:g}" if flow else ""
            directions, changes = latent_traversal.most_changing(
                self.engine, objective, subject.nets, z, labels, count, subject.options.seed
            )
            width = STANDARD.bin_width / subject.trained.objective.pixels.bin_width
            rows = [
                {"direction": k + 1, "change_per_unit": width * c} for k, c in enumerate(changes)
            ]
        path = along_directions(z[0], directions, COLUMNS, reach)
        sheet = self._decode(path, labels[:1].expand(count))
        far = latent_traversal.distance_of_ends(subject.classifier, sheet)
        rows = [{**row, "distance_of_ends": d} for row, d in zip(rows, far, strict=True)]
        return {"moved": moved, "reach": reach, "rows": rows}, sheet

    def _by_kl(
        self, objective: VAEObjective, z: Tensor, count: int
    ) -> tuple[str, Tensor, list[dict[str, Any]]]:
        """Choose the latents that say most of test images, nats on average."""
        subject, device = self.subject, self.engine.device
        number = min(len(subject.test), subject.options.num_images)

        def told(mine: Tensor) -> Tensor:
            return objective.kl_by_latent(
                subject.nets, latent_traversal.load(subject.test, mine, device)
            )

        with torch.no_grad():
            kl, latents = self.engine.map_rows(number, told).double().mean(0).topk(count)
        rows = [
            {"latent": int(latent), "kl_nats": float(nats)}
            for latent, nats in zip(latents, kl, strict=True)
        ]
        directions = functional.one_hot(latents, z.shape[1]).to(z)
        return f"latents that say most of {number} test images", directions, rows

    def _begin(self, count: int) -> tuple[Tensor, Tensor]:
        """Give latents [count, D] to walk from, of test images where they can be had; labels."""
        subject, seed = self.subject, self.subject.options.seed
        if isinstance(self.objective, Encoder):
            index = self.ends[:count]
            found = latent_traversal.encode_on_all(
                self.engine, self.objective, subject.nets, subject.test, index, seed
            )
            return found, torch.from_numpy(subject.test.labels(index.numpy()))
        numbers = torch.arange(count)
        draws = Draws.of(seed, numbers.to(self.engine.device))
        # Pairs of a class.
        return self.objective.latents(draws), uniform_labels(count, self.subject.counts)[
            numbers // 2
        ]

    def _decode(self, z: Tensor, labels: Tensor) -> Tensor:
        objective = self.subject.trained.objective
        made = latent_traversal.decode_on_all(
            self.engine, self.objective, self.subject.nets, z, labels, objective.sample_config.batch
        )
        return objective.pixels.convert(made, STANDARD)

    def try_settings(self, settings: list[dict[str, Any]]) -> Explored:
        """Make the same draws at each setting, and measure them beside real test images."""
        subject, options = self.subject, self.subject.options
        labels = labels_by_frequency(options.num_images, subject.counts)
        seen = describe_real(
            self.engine, cache_root(), of_classifier(subject.classifier), subject.real,
            identify(subject.real),
        )  # fmt: skip
        judge = Judge(subject.classifier, seen.moments, self.by_class)
        fixed = {} if options.sampler is None else {"sampler": options.sampler}
        rows, sheet = try_settings(
            self.engine, subject.trained.objective, subject.nets, judge, settings, labels,
            options.num_shown, options.seed, **fixed,
        )  # fmt: skip
        every = subject.test.labels(np.arange(len(subject.test)))
        if is_balanced(subject.counts):
            index = in_turn(every, options.num_images, options.seed)
        else:  # as frequent as they are, like the generated ones
            index = permutation(options.seed, 0, len(every)).numpy()[: options.num_images]
        real = to_input(subject.test.images(index), self.engine.device)
        found = {
            "varied": list(settings[0]),
            "num_images": options.num_images,
            "labels": subject.labels_are(),
            "real": judge(real, torch.from_numpy(every[index])),
            "rows": rows,
        }
        if "steps" in settings[0]:
            found["sampler"] = options.sampler or subject.trained.objective.sample_config.sampler
        return found, sheet
