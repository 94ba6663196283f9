"""Normalizing flows: RealNVP and Glow, with likelihoods exact for dequantized data."""
