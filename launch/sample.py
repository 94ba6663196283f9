"""Make images with a trained run: `python launch/sample.py runs/ddpm-small --per_class 10`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
