"""Train and compare the exercises' runs: `python launch/exercises.py --data shapes`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
