"""Normalizing flows: RealNVP and Glow, with exact likelihoods."""
