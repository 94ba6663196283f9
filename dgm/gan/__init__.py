"""Generative adversarial networks: a generator and a discriminator that learn in turn."""
