"""The tests, a regular package since torch-fidelity installs another one named `tests`."""
