"""Train a variational autoencoder: `accelerate launch launch/train_vae.py`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
