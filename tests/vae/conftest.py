"""Every test here is of small sizes."""

from small_sizes import one_thread, seed

__all__ = ["one_thread", "seed"]
