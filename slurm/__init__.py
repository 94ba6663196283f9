"""Run trainers on a Slurm cluster: submit, continue after an interruption, look at the state."""
