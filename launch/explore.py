"""Explore the latent space and the sampler settings of a run: `python launch/explore.py RUN`."""

from dgm.cli.entry import run
from dgm.cli.explore import main

if __name__ == "__main__":
    run(main)
