"""The published configurations: four architectures, and the same at equal size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_vae import ARCHITECTURES

from dgm.cli.parser import parse
from dgm.cli.train_vae import Config
from dgm.vae.networks import VAE

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
SIDES = {f"{k}_{name}": sides for k, (name, sides) in enumerate(ARCHITECTURES.items(), start=1)}
SHAPE = (32, 32, 3)


def read(name: str) -> Config:
    return parse(Config, "", ["--config", str(CONFIGS / f"vae_{name}.yaml")])


def count(name: str) -> int:
    with torch.device("meta"):
        net = VAE(read(name).model, SHAPE, read(name).vae.scale == "pixel")
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", SIDES)
def test_each_architecture_has_its_configuration(name: str):
    names = [name] if name == "4_both" else [name, f"matched_{name}"]
    for each in names:
        model = read(each).model
        assert (model.encoder, model.decoder) == SIDES[name]


@pytest.mark.parametrize("name", ["1_plain", "2_encoder", "3_decoder"])
def test_matched_configurations_have_the_parameters_of_both(name: str):
    expected = count("4_both")
    assert abs(count(f"matched_{name}") - expected) <= 0.01 * expected
    assert count(name) < 0.9 * expected  # so there was something to match


def test_configurations_differ_only_in_architecture_width_and_folder():
    plain = read("1_plain")
    model = plain.model
    for path in CONFIGS.glob("vae_*.yaml"):
        name = path.stem.removeprefix("vae_")
        if name.startswith(("small", "tiny")):
            continue
        other = read(name)
        assert other.run.dir == f"runs/vae-{name.replace('_', '-')}"
        same = replace(
            other.model,
            encoder=model.encoder,
            decoder=model.decoder,
            encoder_channels=model.encoder_channels,
            decoder_channels=model.decoder_channels,
        )
        assert replace(other, model=same, run=plain.run) == plain


def test_defaults_are_those_of_the_plain_configuration():
    plain = read("1_plain")
    assert plain.model == Config().model and plain.vae == Config().vae
    assert plain.sample == Config().sample
