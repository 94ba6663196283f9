"""Bits per dimension of a run and of a public implementation trained on the same images.

The peers (dgm/benchmarks/peer_models.py) are the public nets and losses in our loop; images, order,
flips, batch, optimizer and weight average are the run's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dgm.benchmarks.peer_models import NormflowsGlow, PythaeVAE
from dgm.cli.assemble import Parts, make_job
from dgm.cli.load_run import load_run
from dgm.cli.parser import open_config
from dgm.cli.path_checks import check_folder
from dgm.common.command_line import home_path
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.evaluation.likelihood import ImageSubset, bits_per_dim
from dgm.evaluation.online_eval import require_likelihood
from dgm.flow.networks import FlowNetConfig
from dgm.rng import permutation
from dgm.training import checkpoint
from dgm.training.process_settings import start_engine
from dgm.training.run_folder import RunFolder
from dgm.training.state_dicts import load_nets
from dgm.training.trainer import Trainer
from dgm.vae.networks import VAENetConfig
from shards.reader import open_shards

SEED = 1  # chooses the test images, and is that of their draws


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run", type=Path, help="run folder of a glow or a vae")
    add("--out", type=Path, required=True, help="run folder of the public model")
    add("--test-shards", type=home_path, nargs="+", required=True, help="folders of test shards")
    add("--num-test", type=int, default=1000, help="test images of each folder")
    add("--lr", type=float, help="learning rate of the public model; default: the run's")
    variance = "variance of pythae's Gaussian in training, for pixels in [0, 1]"
    add("--variance", type=float, default=0.005, help=variance)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare a run's bits per dimension with those of a public model on the same images."""
    check_range(args, "--", "num-test", min=2)
    check_range(args, "--", "variance", "lr", above=0)
    check_folder("--out", args.out)
    if args.out.resolve() == args.run.resolve():
        raise UserError(
            f"--out is {args.out}, the run itself: choose a folder for the public model"
        )
    ours = load_run(args.run)
    config = open_config(args.run / "config.yaml")
    tests = {name: open_shards(name, config.data.resize) for name in args.test_shards}
    images = open_shards(config.data.shards, config.data.resize)
    torch.manual_seed(config.run.seed)
    peer = _make_peer(config.model, images.image_shape, args)
    objective = require_likelihood(ours.objective, "the metric")
    config = replace(
        config,
        run=replace(config.run, dir=str(args.out)),
        optim=config.optim if args.lr is None else replace(config.optim, lr=args.lr),
        train=replace(config.train, total_images=ours.images_seen),
        eval=replace(config.eval, every_images=0),
    )
    engine = start_engine("no")
    try:
        job = make_job(config, engine, images, Parts({peer.phases[0].net: peer.net}, peer))
        if not Trainer(job).train(RunFolder(config, args.out)):
            raise UserError(f"{args.out} was stopped and saved: run the same command to continue")
        newest = checkpoint.newest(args.out / "checkpoints")
        assert newest is not None, "the training loop ends with a checkpoint"
        load_nets(job.nets, checkpoint.read(newest).ema)
        for net in (*job.nets.values(), *ours.nets.values()):
            net.eval().to(engine.device)
        peer.fit_to_data(images)
        found = {}
        for name, test in tests.items():
            index = permutation(SEED, 0, len(test))[: args.num_test]
            subset = ImageSubset(engine, test, index, SEED)
            found[name] = {
                "this run": bits_per_dim(objective, ours.nets, subset),
                peer.title: bits_per_dim(peer, job.nets, subset),
            }
    finally:
        engine.close()
    _print(found, ours.images_seen)
    return {"images_seen": ours.images_seen, "bits_per_dim": found}


def _make_peer(
    model: Any, image_shape: tuple[int, int, int], args: argparse.Namespace
) -> NormflowsGlow | PythaeVAE:
    if isinstance(model, VAENetConfig):
        return PythaeVAE(model.latent, image_shape, args.variance)
    if isinstance(model, FlowNetConfig) and model.architecture == "glow":
        return NormflowsGlow(model.levels, model.steps, model.hidden, image_shape)
    raise UserError(
        f"{args.run} is neither a vae nor a glow: choose such a run, since others have no peer"
    )


def _print(found: dict[str, dict[str, dict[str, float]]], images_seen: int) -> None:
    print(f"\n{f'bits per dimension, {images_seen:,} images seen':50} {'':>10} {'error':>8}")
    for test, of_test in found.items():
        for title, bits in of_test.items():
            total = bits.get("exact", bits.get("bound"))
            print(f"{f'{Path(test).name}, {title}':50} {total:>10.3f} {bits['error']:>8.3f}")
