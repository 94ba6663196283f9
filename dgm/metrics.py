"""Properties of a metric by its key: whether it is a fraction, and which direction is better."""

from __future__ import annotations

_FRACTIONS = (
    "consistency", "accuracy", "certainty", "class seen", "class_seen", "precision", "recall",
    "coverage", "share_", "nearer_than", "active_latents",
)  # fmt: skip


def is_fraction(name: str) -> bool:
    """Return whether a metric lies between 0 and 1."""
    return any(word in name for word in _FRACTIONS)


def higher_is_better(key: str) -> bool | None:
    """Return whether a higher value is better, a lower one (False), or neither (None)."""
    last = key.split("/")[-1]
    if "_on_real_" in key or last.endswith("error"):  # of the classifier; of the estimate
        return None
    if last.startswith(("nearer_than", "share_")):  # best when equal to that of real images
        return None
    if last == "active_latents":  # the right number depends on the data
        return None
    if is_fraction(key):
        return None if key.startswith("train/") else True  # a discriminator's accuracy is no goal
    higher = ("score_", "inception_score", "psnr", "ssim")
    if last == "elbo" or "images_per_s" in key or last.startswith(higher):
        return True
    lower = (
        "loss", "fd_", "kd_", "fid", "kid", "eps_mse", "bits_per_dim", "rms_", "seconds_", "vlb",
    )  # fmt: skip
    is_lower = last.startswith(lower) or last.endswith(("nll", "distance"))
    is_total = last in ("exact", "bound", "importance_weighted") and "bits_per_dim" in key
    return False if is_lower or is_total else None
