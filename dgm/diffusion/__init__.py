"""Diffusion models: schedules, forward process, U-Net, objective, samplers, likelihoods."""
