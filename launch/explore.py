"""Walk through what a run has learned, and try its settings: `python launch/explore.py RUN`."""

from dgm.cli.entry import run
from dgm.cli.explore import main

if __name__ == "__main__":
    run(main)
