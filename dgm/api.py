"""The Python API: load a trained run, or train one, from a script or a notebook."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from dgm.cli import evaluate
from dgm.cli.assemble import Parts, run_training
from dgm.cli.load_run import TrainedRun, load_run
from dgm.cli.metric_selection import choose_metrics
from dgm.cli.parser import CONFIGS, TRAINERS, family_module, parse_options
from dgm.common.atomic_dirs import new_folder
from dgm.common.errors import UserError
from dgm.common.run_files import read_config, read_metrics
from dgm.images import to_uint8
from dgm.nn.layers import use_kernels
from dgm.objective import Objective
from dgm.training.process_settings import start_engine
from dgm.training.sampling import sample_distributed
from shards.build import default_root
from shards.format import INDEX
from shards.sources import Source
from shards.write import write_folder

Network = nn.Module | dict[str, nn.Module]
"""A network, or a family's networks by name; each is called like the family's own network."""
_SECTIONS = {trainer: section for section, trainer in TRAINERS.items()}


class Run:
    """A run folder with the networks of one of its checkpoints."""

    def __init__(self, folder: Path, trained: TrainedRun, device: torch.device):
        """Move the networks to a device. Use `dgm.load` to open a run."""
        assert trained.image_shape is not None, "a run folder has it"
        self.folder, self.device = folder, device
        self.family: str = trained.family
        """diffusion, gan, vae or flow."""
        self.model: dict[str, nn.Module] = {k: v.to(device) for k, v in trained.nets.items()}
        """Networks by name: `net`, `vae`, `flow`, or `generator` and `discriminator`."""
        self.objective: Objective = trained.objective
        """`loss`, `sample` and, where the family has them, `encode`, `decode`."""
        self.images_seen: int = trained.images_seen
        """Images seen at the checkpoint."""
        self.classes: list[str] = trained.classes
        """Names of the classes, in the order of their labels."""
        self.image_shape: tuple[int, int, int] = trained.image_shape
        """(H, W, C)."""
        for net in self.model.values():
            use_kernels(net)

    def __repr__(self) -> str:
        return f"Run('{self.folder}', {self.family}, {self.images_seen:,} images seen)"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the configuration by dotted key."""
        return read_config(self.folder / "config.yaml")

    @torch.no_grad()
    def sample(
        self, num_images: int, labels: Sequence[int] | None = None, *, seed: int = 0, **knobs: Any
    ) -> Tensor:
        """Return generated images, uint8 [N, H, W, C], on the CPU.

        labels: classes [N]; None cycles through all classes. seed: image k depends only on the
        seed, k and its label. knobs: options of `sample.*`, such as steps, guidance, sampler, eta
        (of a diffusion model) or temperature (of the other families), and batch.
        Raise ValueError for a label or an option that the run does not have.
        """
        given = [k % len(self.classes) for k in range(num_images)] if labels is None else labels
        if len(given) != num_images or not all(0 <= k < len(self.classes) for k in given):
            raise UserError(
                f"labels are {list(given)[:5]}...: give {num_images} numbers from 0 to "
                f"{len(self.classes) - 1}"
            )
        known = vars(self.objective.sample_config)
        for name in knobs.keys() - known.keys():
            raise UserError(
                f"{name} is not an option of a {self.family} run: choose from {', '.join(known)}"
            )
        with contextlib.closing(start_engine("no")) as engine:
            samples = sample_distributed(
                engine, self.objective, self.model, torch.arange(num_images), torch.tensor(given),
                seed, **knobs,
            )  # fmt: skip
        return torch.from_numpy(to_uint8(samples, self.objective.pixels))

    def history(self) -> dict[str, list[float]]:
        """Return the logged metrics as columns of equal length, NaN where one was not logged."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        keys = dict.fromkeys(key for line in lines for key in line)
        return {key: [line.get(key, math.nan) for line in lines] for key in keys}

    def evaluate(self, metrics: Iterable[str] | None = None, **options: Any) -> dict[str, Any]:
        """Evaluate as `launch/evaluate.py` does: return the metrics, and write evaluation.json.

        metrics: names, as for its --metrics; None uses those that apply to the run. options: its
        other options, such as num_images=500, seeds=2, features="inception".
        """
        words = [str(self.folder), f"--checkpoint={self.images_seen}"]
        words += [] if metrics is None else [f"--metrics={','.join(metrics)}"]
        words += [f"--{name}={value}" for name, value in options.items()]
        chosen = parse_options(evaluate.make_parser(), words)
        evaluate.check(chosen)
        with contextlib.closing(start_engine("no")) as engine:
            context = evaluate.open_context(chosen, engine, self.folder)
            found = evaluate.evaluate(context, choose_metrics(context))
        evaluate.save(found, self.folder / "evaluation.json")
        return found


def load(
    folder: str | Path,
    checkpoint: int | Literal["best"] | None = None,
    *,
    ema: bool = True,
    device: str | torch.device | None = None,
    network: Network | None = None,
    objective: Objective | None = None,
) -> Run:
    """Load a trained run.

    checkpoint: by images seen, or `best` by the run's own evaluation; None is the newest.
    ema: use the moving average of the weights. device: None is a GPU if there is one. network,
    objective: those that the run was trained with, if not the family's own.
    Raise ValueError if the folder holds no such run or checkpoint.
    """
    path = Path(folder).expanduser()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_run(path, checkpoint, ema, functools.partial(_replace, network, objective))
    return Run(path, trained, torch.device(chosen))


def train(
    family: str,
    images: Any = None,
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    out: str | Path,
    classes: Sequence[str] | None = None,
    config: str | Path | None = None,
    network: Network | None = None,
    objective: Objective | None = None,
    **keys: Any,
) -> Run:
    """Train a run, or resume the one in `out`, and load it.

    family: ddpm, gan, vae or flow. images: uint8 [N, H, W, 3], or a dataset of (image, label) pairs
    with PIL or uint8 [H, W, 3] images; None uses the configuration's `data.*`. labels: classes
    [N], from 0; None is a single class. config: a path, or the name of a file in launch/configs;
    None is the published one. network, objective: replace the family's own; networks by name for a
    GAN. keys: configuration keys, as `**{"train.total_images": 10_000}`.
    Raise ValueError for invalid arguments, and KeyboardInterrupt if training was stopped: the same
    call then resumes it.
    """
    section = _SECTIONS.get(family, family)
    if section not in TRAINERS:
        raise UserError(f"family is {family}: choose from {', '.join(_SECTIONS)}")
    module = family_module(section)
    chosen = {"run.dir": str(Path(out).expanduser()), **keys}
    if images is not None:
        chosen["data.shards"] = str(_as_shards(images, labels, classes))
    words = [f"--{key}={'null' if value is None else value}" for key, value in chosen.items()]
    if config is not None:
        named = CONFIGS / config
        words += ["--config", str(named if named.is_file() else config)]

    def make_parts(settings: Any, image_shape: tuple[int, int, int], num_classes: int) -> Parts:
        parts = _replace(network, objective, module.make_parts(settings, image_shape, num_classes))
        parts.nets = {name: net.to(settings.train.dtype) for name, net in parts.nets.items()}
        return parts

    is_done = run_training(module.Config, module.DEFAULT_CONFIG, make_parts, words, _interrupt) == 0
    if not is_done:
        raise KeyboardInterrupt(f"{out} was stopped after saving: the same call resumes it")
    return load(out, network=network, objective=objective)


def _replace(network: Network | None, objective: Objective | None, parts: Parts) -> Parts:
    """Return the parts of a family with the given networks and objective in place of its own."""
    if network is not None:
        given = network if isinstance(network, dict) else {next(iter(parts.nets)): network}
        if given.keys() != parts.nets.keys():
            raise UserError(f"network has {', '.join(given)}: give {', '.join(parts.nets)} by name")
        parts.nets = dict(given)
    if objective is not None:
        parts.objective = objective
    return parts


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def _as_shards(images: Any, labels: Any, classes: Sequence[str] | None) -> Path:
    """Return a folder of shards with these images, named by their hash; write it if missing."""
    if not isinstance(images, np.ndarray | Tensor):
        pairs = [images[k] for k in range(len(images))]
        images = np.stack([_as_rgb(image) for image, _ in pairs])
        labels = [int(label) for _, label in pairs] if labels is None else labels
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise UserError(f"images are {pixels.dtype} {list(pixels.shape)}: give uint8 [N, H, W, 3]")
    numbers = np.zeros(len(pixels), int) if labels is None else np.asarray(labels)
    if numbers.shape != (len(pixels),) or numbers.min(initial=0) < 0:
        raise UserError(f"labels have shape {list(numbers.shape)}: give {len(pixels)} numbers")
    names = tuple(classes or map(str, range(int(numbers.max(initial=0)) + 1)))
    if len(names) <= numbers.max(initial=0):
        raise UserError(f"labels go up to {numbers.max()}, but classes names {len(names)}")
    digest = hashlib.sha256(pixels.tobytes() + numbers.astype("<i8").tobytes())
    digest.update(repr((pixels.shape, names)).encode())
    folder = (default_root() / f"array-{digest.hexdigest()[:16]}").absolute()
    if not (folder / INDEX).is_file():
        samples = lambda: ((p, int(k)) for p, k in zip(pixels, numbers, strict=True))  # noqa: E731
        height, width, channels = pixels.shape[1:]
        source = Source("array", names, (height, width, channels), len(pixels), samples)
        with new_folder(folder, identity=INDEX) as partial:
            write_folder(source, partial, "train", progress=False)
    return folder


def _as_rgb(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
