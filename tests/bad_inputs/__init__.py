"""Bad input for every command: each case ends with exit code 2 and one line on stderr that names
the thing, its value and the remedy, and leaves no file behind.
"""

from tests.bad_inputs import scripts, shards_and_slurm, trainers

CASES = [*trainers.CASES, *scripts.CASES, *shards_and_slurm.CASES]
