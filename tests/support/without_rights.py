"""Run a script without root's rights: `python without_rights.py SCRIPT WORDS ...`.

Root gives up its capabilities (capset(2)), so that the modes of files hold for it too.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

_VERSION_3 = 0x20080522  # of linux/capability.h

if __name__ == "__main__":
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, ctypes.get_errno()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
