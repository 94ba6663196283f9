"""The faults that the drill injects."""

from tests.drills.faults import (
    builds,
    clock,
    damage,
    data,
    disks,
    kills,
    numbers,
    processes,
    soak,
    surroundings,
    sweeps,
)

FAULTS = (
    *kills.FAULTS,
    *builds.FAULTS,
    *sweeps.FAULTS,
    *disks.FAULTS,
    *damage.FAULTS,
    *processes.FAULTS,
    *clock.FAULTS,
    *data.FAULTS,
    *numbers.FAULTS,
    *surroundings.FAULTS,
    *soak.FAULTS,
)
