"""Train and evaluate the exercises, and write their pages: `python launch/exercises.py`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
