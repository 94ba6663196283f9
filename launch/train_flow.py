"""Train a normalizing flow: `accelerate launch launch/train_flow.py`."""

if __name__ == "__main__":
    from dgm.cli.entry import run, stop_at_signals

    stop_at_signals()  # libraries take seconds to import

    from dgm.cli.train_flow import main

    run(main)
