"""Exit codes of every command."""

DONE, FAULT, MISTAKE, STOPPED = 0, 1, 2, 75
"""Done; a defect or a machine fault; the user's mistake; stopped on request, after saving."""
