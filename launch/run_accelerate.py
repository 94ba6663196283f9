"""Start a trainer with accelerate: `python launch/run_accelerate.py OPTIONS SCRIPT ...`.

The options are those of `accelerate launch`. It ends with the trainer's own exit code, shows
its error in one line without a traceback of the launcher, and on Ctrl-C waits until the run is
saved.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dgm.cli.entry import stop_at_signals

    stop_at_signals()

from dgm.common.streams import keep_streams
from dgm.training.accelerate_launch import launch

if __name__ == "__main__":
    keep_streams()
    sys.exit(launch(sys.argv[1:]))
