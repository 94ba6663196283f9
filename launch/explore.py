"""Explore the latent space and the sampler settings of a run: `python launch/explore.py RUN`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
