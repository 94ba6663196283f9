"""Train a GAN: `accelerate launch launch/train_gan.py`."""

if __name__ == "__main__":
    from dgm.cli.early_stop import watch_early

    watch_early()  # libraries take seconds to import

    from dgm.cli.entry import run
    from dgm.cli.train_gan import main

    run(main)
