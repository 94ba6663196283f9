"""The faults of the drill."""

from tests.drills.faults import damage, kills, machine, sweeps

FAULTS = (*kills.FAULTS, *sweeps.FAULTS, *damage.FAULTS, *machine.FAULTS)
