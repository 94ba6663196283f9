"""Make images with a trained run: `python launch/sample.py runs/ddpm-small --per_class 10`."""

from dgm.cli.entry import run
from dgm.cli.sample import main

if __name__ == "__main__":
    run(main)
