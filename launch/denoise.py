"""Noise real test images partially and denoise them: `python launch/denoise.py RUN`."""

from dgm.cli.denoise import main
from dgm.cli.entry import run

if __name__ == "__main__":
    run(main)
