"""Kernels of our own, in Triton; each has a plain torch reference beside it."""
