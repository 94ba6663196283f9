"""Train, measure and answer the exercises: `python launch/exercises.py --data shapes`."""

from dgm.cli.entry import run
from dgm.cli.exercises import main

if __name__ == "__main__":
    run(main)
