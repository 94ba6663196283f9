"""How the scripts here end: a mistake of the user's is one line and exit code 2.

As `dgm.cli.parser.run`, without its imports: `run.py` starts before all packages are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from dgm.common.errors import UserError, disk_fault

MISTAKE = 2


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its code."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        line = str(error) if isinstance(error, UserError) else disk_fault(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(MISTAKE)
