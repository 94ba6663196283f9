"""Train a class-conditional diffusion model: `accelerate launch launch/train_ddpm.py`."""

if __name__ == "__main__":
    from dgm.cli.entry import run, stop_at_signals

    stop_at_signals()  # libraries take seconds to import

    from dgm.cli.train_ddpm import main

    run(main)
