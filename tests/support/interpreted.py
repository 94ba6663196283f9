"""Make Triton's interpreter work with numpy 2.4 and later."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def mend_interpreter() -> None:
    """Make scalars of Triton's interpreter usable in loops with any numpy.

    It holds a scalar as an array of one dimension and calls int() on that, which numpy refuses from
    2.4 on. Triton 3.6 needs this and 3.9 does not; those between were not tried.
    """
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
