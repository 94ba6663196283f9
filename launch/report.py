"""Write a page on runs: `python launch/report.py runs/small-ddpm-shapes`."""

from dgm.cli.entry import run
from dgm.cli.report import main

if __name__ == "__main__":
    run(main)
