"""Write a report on runs: `python launch/report.py runs/small-ddpm-shapes`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
