"""Kernels in Triton and C++, each with an equivalent in torch's operators."""
