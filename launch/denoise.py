"""Noise real test images partially and denoise them: `python launch/denoise.py RUN`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
