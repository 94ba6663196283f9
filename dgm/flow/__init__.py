"""Normalizing flows: RealNVP and Glow, with likelihoods exact for dequantised data."""
