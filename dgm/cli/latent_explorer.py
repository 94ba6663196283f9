"""Interpolation and traversal of a trained run's latents, and a sweep of its sampler's settings."""

from __future__ import annotations

from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dgm.cli.eval_context import EvalContext
from dgm.common.errors import UserError
from dgm.diffusion.objective import DiffusionObjective
from dgm.evaluation import latent_traversal
from dgm.evaluation.class_labels import (
    balanced_subset,
    is_balanced,
    labels_by_frequency,
    uniform_labels,
)
from dgm.evaluation.classifier import to_input
from dgm.evaluation.image_similarity import feature_distance, psnr
from dgm.evaluation.likelihood import load_batch
from dgm.evaluation.sampler_sweep import SampleQuality, sweep_sampler
from dgm.latent_space import lerp_path, slerp_path, traverse_directions
from dgm.objective import LatentDecoder, LatentEncoder
from dgm.preprocessing import STANDARD
from dgm.rng import Draws, permutation
from dgm.vae.objective import VAEObjective

NUM_COLUMNS = 11  # of an interpolation or traversal
REACH = 3.0  # standard deviations of the prior, in both directions
NUM_DIRECTIONS = 8
NUM_POINTS = 4  # latents near which directions are sought
Explored = tuple[dict[str, Any], Tensor]  # metrics, and a sheet [rows, columns, C, H, W]


class Explorer:
    """A trained run, and the latents or test images to start from."""

    def __init__(self, context: EvalContext):
        """Choose test images: balanced by class, in pairs of a class if class-conditional."""
        self.context, self.engine = context, context.engine
        self.objective = cast(LatentDecoder, context.trained.objective)
        self.encodes = isinstance(self.objective, LatentEncoder)
        options = context.options
        labels = context.test.labels(np.arange(len(context.test)))
        run = 2 if context.class_conditional else 1
        rows = balanced_subset(labels, 2 * options.num_pairs, options.seed, run)
        self.ends = torch.from_numpy(rows)
        if len(self.ends) < 2:
            raise UserError(
                f"{options.test_shards or 'the test images'} hold {len(labels)} images, too few "
                "to interpolate between: choose others by --test_shards"
            )

    def interpolate(self) -> Explored:
        """Interpolate between test images, or between latents if there is no encoder."""
        context = self.context
        z, labels = self._start(len(self.ends) // 2 * 2)
        # A flow's latents hold all of an image, and the arc between two of them leaves the data;
        # Kingma and Dhariwal 2018 (section 6) interpolate along the line.
        path = context.options.path or ("line" if context.trained.family == "flow" else "sphere")
        interpolate = {"line": lerp_path, "sphere": slerp_path}[path]
        sheet = self._decode(interpolate(z[0::2], z[1::2], NUM_COLUMNS), labels[0::2])
        rows: list[dict[str, Any]] = [*latent_traversal.smoothness(context.classifier, sheet)]
        between = "test images" if self.encodes else "latents"
        metrics: dict[str, Any] = {"between": between, "along": path}
        for name in ("mean_step", "largest_over_mean"):
            metrics[name] = fmean(row[name] for row in rows)
        if self.encodes or context.class_conditional:
            names = [context.trained.classes[int(label)] for label in labels]
            ends = zip(names[0::2], names[1::2], strict=True)
            rows = [{"from": a, "to": b, **row} for (a, b), row in zip(ends, rows, strict=True)]
        metrics["rows"] = rows
        if self.encodes:
            real = to_input(context.test.images(self.ends[: len(z)].numpy()), self.engine.device)
            decoded = torch.stack([sheet[:, 0], sheet[:, -1]], dim=1).flatten(0, 1)
            metrics["psnr_db_of_ends"] = float(
                psnr(STANDARD.to_levels(decoded), STANDARD.to_levels(real)).mean()
            )
            sheet = torch.cat([real[0::2, None], sheet, real[1::2, None]], dim=1)
        return metrics, sheet

    def traverse(self) -> Explored | None:
        """Vary single latents of a VAE, or directions in which images of a flow or GAN change most.

        None for a diffusion model.
        """
        context, objective = self.context, self.objective
        if isinstance(objective, DiffusionObjective):
            return None
        z, labels = self._start(NUM_POINTS)
        # Near latents at temperature 1 a flow's images change most where they break down: use the
        # temperature of its samples.
        flow = context.trained.family == "flow"
        temperature = context.trained.objective.sample_config.temperature if flow else 1.0
        z, reach = temperature * z, temperature * REACH
        count = min(NUM_DIRECTIONS, z.shape[1])
        if isinstance(objective, VAEObjective):
            moved, directions, rows = self._latents_by_kl(objective, z, count)
        else:
            moved = "directions in which images change most"
            moved += f", at temperature {temperature:g}" if flow else ""
            directions, changes = latent_traversal.most_changing_directions(
                self.engine, objective, context.nets, z, labels, count, context.options.seed
            )
            width = STANDARD.bin_width / context.trained.objective.pixels.bin_width
            rows = [
                {"direction": k + 1, "change_per_unit": width * c} for k, c in enumerate(changes)
            ]
        path = traverse_directions(z[0], directions, NUM_COLUMNS, reach)
        sheet = self._decode(path, labels[:1].expand(count))
        distances = feature_distance(context.classifier, sheet[:, 0], sheet[:, -1]).tolist()
        rows = [{**row, "distance_of_ends": d} for row, d in zip(rows, distances, strict=True)]
        return {"moved": moved, "reach": reach, "rows": rows}, sheet

    def _latents_by_kl(
        self, objective: VAEObjective, z: Tensor, count: int
    ) -> tuple[str, Tensor, list[dict[str, Any]]]:
        """Choose the latents with the largest mean KL divergence, nats, on test images."""
        context, device = self.context, self.engine.device
        num_images = min(len(context.test), context.options.num_images)

        def kl_by_latent(rows: Tensor) -> Tensor:
            return objective.kl_by_latent(context.nets, load_batch(context.test, rows, device))

        with torch.no_grad():
            mean = self.engine.map_rows(num_images, kl_by_latent).double().mean(0)
        kl, latents = mean.topk(count)
        rows = [
            {"latent": int(latent), "kl_nats": float(nats)}
            for latent, nats in zip(latents, kl, strict=True)
        ]
        directions = functional.one_hot(latents, z.shape[1]).to(z)
        return f"latents of the largest KL on {num_images} test images", directions, rows

    def _start(self, count: int) -> tuple[Tensor, Tensor]:
        """Return latents [count, D], of test images if there is an encoder, and labels."""
        context, seed = self.context, self.context.options.seed
        if isinstance(self.objective, LatentEncoder):
            index = self.ends[:count]
            z = latent_traversal.encode_on_all(
                self.engine, self.objective, context.nets, context.test, index, seed
            )
            return z, torch.from_numpy(context.test.labels(index.numpy()))
        index = torch.arange(count)
        draws = Draws.of(seed, index.to(self.engine.device))
        in_pairs = uniform_labels(count, context.counts)[index // 2]
        return self.objective.latents(draws), in_pairs

    def _decode(self, z: Tensor, labels: Tensor) -> Tensor:
        objective = self.context.trained.objective
        decoded = latent_traversal.decode_on_all(
            self.engine, self.objective, self.context.nets, z, labels, objective.sample_config.batch
        )
        return objective.pixels.convert(decoded, STANDARD)

    def sweep(self, settings: list[dict[str, Any]]) -> Explored:
        """Sample with the same draws at each setting; add the metrics of real test images."""
        context, options = self.context, self.context.options
        labels = labels_by_frequency(options.num_images, context.counts)
        real_statistics = context.features_of(context.train).statistics
        quality = SampleQuality(context.classifier, real_statistics, context.class_conditional)
        fixed = {} if options.sampler is None else {"sampler": options.sampler}
        rows, sheet = sweep_sampler(
            self.engine, context.trained.objective, context.nets, quality, settings, labels,
            options.num_shown, options.seed, **fixed,
        )  # fmt: skip
        test_labels = context.test.labels(np.arange(len(context.test)))
        if is_balanced(context.counts):
            index = balanced_subset(test_labels, options.num_images, options.seed)
        else:  # as frequent as they are, like the generated ones
            index = permutation(options.seed, 0, len(test_labels)).numpy()[: options.num_images]
        real = to_input(context.test.images(index), self.engine.device)
        found = {
            "varied": list(settings[0]),
            "num_images": options.num_images,
            "labels": context.label_policy(),
            "real": quality(real, torch.from_numpy(test_labels[index])),
            "rows": rows,
        }
        if "steps" in settings[0]:
            found["sampler"] = options.sampler or context.trained.objective.sample_config.sampler
        return found, sheet
