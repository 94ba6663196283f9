"""Check runs before slurm.submit submits them: `python launch/preflight.py < REQUEST`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
