"""Deep generative models: families, their shared layers and draws, training, reports."""
