"""The user's mistakes, told in one line."""


class SlurmError(ValueError):
    """Something that the user can mend; the message says what, and how."""
