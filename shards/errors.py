"""The error of this package."""


class ShardError(ValueError):
    """Report the user's mistake or damaged data, in one line that names thing, value and remedy."""
