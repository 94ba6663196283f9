"""Work on many rows, each process a part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgm.train.engine import Engine


def on_all(engine: Engine, count: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Let each process work on its part of the rows 0 to `count` - 1; all get the whole.

    `work` turns numbers of rows int64 [n], on the CPU, into [n, ...]; the result is [count, ...].
    All processes must ask.
    """
    each = -(-count // engine.world_size)
    # The last process may lack a few; it repeats the last row, and all take equal parts.
    mine = torch.arange(engine.rank * each, (engine.rank + 1) * each).clamp(max=count - 1)
    return engine.gather(work(mine))[:count]
