"""The tests: a package by name, since torch-fidelity installs one of the same name."""
