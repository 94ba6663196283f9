"""The error that is the user's to mend."""


class UserError(ValueError):
    """A mistake of the user's: one line that names the thing, the value and what to change."""
