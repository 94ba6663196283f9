"""Train a variational autoencoder: `accelerate launch launch/train_vae.py`."""

if __name__ == "__main__":
    from dgm.cli.entry import run, stop_at_signals

    stop_at_signals()  # libraries take seconds to import

    from dgm.cli.train_vae import main

    run(main)
