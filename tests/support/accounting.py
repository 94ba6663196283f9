"""The cluster of four nodes with Slurm's accounting: slurmdbd and its database."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

from dgm.common.errors import UserError
from slurm.devcluster import DevCluster, free_ports, user

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")

SLURM = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
"""
DAEMON = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdAddr=127.0.0.1
DbdHost={host}
DbdPort={port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


class WithAccounting(DevCluster):
    """The cluster with accounting: `sacct` lists jobs that the controller has forgotten."""

    @property
    def environment(self) -> dict[str, str]:
        # The database listens on a socket in the folder only.
        return {**super().environment, "MYSQL_UNIX_PORT": str(self.folder / "db.socket")}

    def start_controller(self) -> None:
        """Start the database, slurmdbd and the controller."""
        (port,) = free_ports(1)
        values = {"folder": self.folder, "port": port, "host": socket.gethostname(), "user": user()}
        with open(self.config, "a") as file:
            file.write(SLURM.format(**values))
        daemon = self.folder / "slurmdbd.conf"
        daemon.write_text(DAEMON.format(**values))
        daemon.chmod(0o600)
        self._start_database()
        self.run("slurmdbd")
        self._try("sacctmgr", "--immediate", "add", "cluster", "four")
        super().start_controller()

    def forget_jobs(self) -> None:
        """Restart the controller, so that only the database knows former jobs."""
        self.kill_daemon("slurmctld")
        super().start_controller()
        self.wait_until_idle()

    def down(self) -> None:
        """Stop all daemons and remove the folder."""
        self.kill_daemon("slurmdbd")
        self.kill_daemon("mariadbd")
        super().down()

    def _start_database(self) -> None:
        folder = self.folder / "db"
        own = ("--no-defaults", f"--datadir={folder}", f"--user={user()}")
        made = ("--auth-root-authentication-method=normal", "--skip-test-db")
        self.run("mariadb-install-db", *own, *made)
        with open(self.folder / "mariadbd.log", "w") as log:
            subprocess.Popen(
                [
                    shutil.which("mariadbd", path=PATH) or "mariadbd",
                    *own,
                    "--skip-networking",
                    f"--socket={self.folder}/db.socket",
                    f"--pid-file={self.folder}/mariadbd.pid",
                ],
                stdout=log,
                stderr=log,
            )
        self._try("mariadb", "--no-defaults", "--user=root", "--execute", "select 1")

    def _try(self, name: str, *words: str) -> None:
        until = time.monotonic() + 30
        while True:
            try:
                self.run(name, *words)
                return
            except UserError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)


def missing_programs() -> list[str]:
    """Return the programs that accounting needs and that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
