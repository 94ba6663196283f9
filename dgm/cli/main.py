"""The command `dgm`: `dgm train ddpm ...`, `dgm sample RUN`, `dgm submit ...` and so on.

Each sub-command takes the options of its script in launch/ or its module of shards or slurm.
"""

from __future__ import annotations

import importlib
import sys

from dgm.common.suggestions import did_you_mean

COMMANDS = {
    "train ddpm": ("dgm.cli.train_ddpm", "train a diffusion model"),
    "train gan": ("dgm.cli.train_gan", "train a GAN"),
    "train vae": ("dgm.cli.train_vae", "train a VAE"),
    "train flow": ("dgm.cli.train_flow", "train a normalizing flow"),
    "sample": ("dgm.cli.sample", "make images with a trained run"),
    "evaluate": ("dgm.cli.evaluate", "compute metrics of trained runs"),
    "denoise": ("dgm.cli.denoise", "denoise test images with a diffusion model"),
    "explore": ("dgm.cli.explore", "interpolate, traverse latents, sweep sampler settings"),
    "report": ("dgm.cli.report", "write an HTML page about runs"),
    "exercises": ("dgm.cli.exercises", "train and compare the exercises' runs"),
    "benchmark": ("dgm.cli.benchmark", "measure speed and memory"),
    "submit": ("slurm.submit", "submit runs or sweeps to Slurm"),
    "status": ("slurm.status", "show the state of submitted runs"),
    "shards build": ("shards.build", "build WebDataset shards from images"),
    "shards verify": ("shards.verify", "check shards against their checksums"),
}
"""Sub-commands: module and description."""


def main() -> None:
    """Run the sub-command named by the first words; exit with code 2 for an unknown one."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if words else 2)
    name = next((c for c in (" ".join(words[:2]), words[0]) if c in COMMANDS), None)
    if name is None:
        given = " ".join(words[: 2 if any(c.startswith(f"{words[0]} ") for c in COMMANDS) else 1])
        hint = did_you_mean(given, COMMANDS) or f"choose one of {', '.join(COMMANDS)}"
        print(f"error: dgm {given} is not a command: {hint.strip()}", file=sys.stderr)
        sys.exit(2)
    module = COMMANDS[name][0]
    # Runs record the script's name.
    sys.argv = [f"launch/{module.split('.')[-1]}.py", *words[len(name.split()) :]]
    if module.startswith("dgm.cli."):
        from dgm.cli.entry import run_script

        run_script(sys.argv[0])
    importlib.import_module(module).command()


def usage() -> str:
    """Return the list of sub-commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  dgm {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "dgm COMMAND --help shows its options."])
