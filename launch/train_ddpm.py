"""Train a class-conditional diffusion model: `accelerate launch launch/train_ddpm.py`."""

if __name__ == "__main__":
    from dgm.cli.early_stop import watch_early

    watch_early()  # libraries take seconds to import

    from dgm.cli.entry import run
    from dgm.cli.train_ddpm import main

    run(main)
