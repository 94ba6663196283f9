"""What each command says to bad input: `python -m tests.bad_inputs` runs all and prints a table.

Of each case the line has to name the thing, its value and the remedy; the code is 2, there is no
traceback and no second line, and nothing is left behind. Exit 1 where that does not hold.
"""

from tests.bad_inputs import of_scripts, of_shards_and_slurm, of_trainers

CASES = [*of_trainers.CASES, *of_scripts.CASES, *of_shards_and_slurm.CASES]
