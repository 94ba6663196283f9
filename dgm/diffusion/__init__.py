"""Diffusion: schedules, predictions, noising, U-Net, objective, samplers."""
