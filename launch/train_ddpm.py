"""Train a class-conditional diffusion model: `accelerate launch launch/train_ddpm.py`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
