"""The published configurations: four architectures, and the same at equal size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dgm.cli.parser import parse
from dgm.cli.train_vae import Config, make_parts
from dgm.vae.networks import VAE

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
SIDES = {
    "1_plain": ("plain", "plain"),
    "2_encoder": ("encoder_decoder", "plain"),
    "3_decoder": ("plain", "encoder_decoder"),
    "4_both": ("encoder_decoder", "encoder_decoder"),
}
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


def test_the_small_configuration_builds_its_net():
    config = read("small")
    parts = make_parts(config, SHAPE, 10)
    assert list(parts.nets) == ["vae"]
    assert [name for name, _ in parts.nets["vae"].named_children()] == ["encoder", "decoder"]
    again = make_parts(config, SHAPE, 10)
    for one, other in zip(
        parts.nets["vae"].parameters(), again.nets["vae"].parameters(), strict=True
    ):
        assert torch.equal(one, other)  # weights follow from run.seed
    text = yaml.safe_load((CONFIGS / "vae_small.yaml").read_text())
    assert text["data"]["source"] == "shapes"
    doubled = make_parts(replace(config, train=replace(config.train, float64=True)), SHAPE, 10)
    assert {p.dtype for p in doubled.nets["vae"].parameters()} == {torch.float64}
