"""Train a variational autoencoder: `accelerate launch launch/train_vae.py`."""

if __name__ == "__main__":
    from dgm.cli.early_stop import watch_early

    watch_early()  # libraries take seconds to import

    from dgm.cli.entry import run
    from dgm.cli.train_vae import main

    run(main)
