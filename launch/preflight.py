"""Check runs before slurm.submit submits them: `python launch/preflight.py < REQUEST`."""

from dgm.cli.entry import run
from dgm.cli.preflight import main

if __name__ == "__main__":
    run(main)
