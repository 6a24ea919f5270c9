"""A real PostgreSQL server for tests: its own cluster in a temporary folder, started and stopped at will.

From Debian's package `postgresql` (binaries in /usr/lib/postgresql/*/bin) or from the PATH. The server refuses to run
as root, so as root it runs as the user that the package makes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "pl4nted-s3cret"
"""Searched for in every file and line of output: nothing else in the project may hold it."""
_USER = "postgres"


def binaries() -> Path | None:
    """Folder of the newest server's programs; none: there is no server on this machine."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if servers:
        return servers[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).parent if on_path else None


@dataclass
class Server:
    """One cluster; `url` names its database, with the password in it."""

    programs: Path
    folder: Path
    port: int

    @staticmethod
    def make(programs: Path, folder: Path) -> Server:
        """Initialise a cluster whose user needs the password."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = Server(programs, folder / "cluster", port)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if os.getuid() == 0:
            for path in (folder, secret):
                shutil.chown(path, _USER)
        server._run("initdb", "-D", server.folder, "-U", _USER, "--auth=scram-sha-256", f"--pwfile={secret}", "-N")
        secret.unlink()
        return server

    def start(self) -> None:
        """Start and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "-D", self.folder, "-w", "-t", "60", "-o", options, "-l", self.folder / "log", "start")

    def stop(self) -> None:
        """Stop it as a power cut would: connections are lost, nothing is said."""
        self._run("pg_ctl", "-D", self.folder, "-m", "immediate", "-w", "stop")

    def url(self, database: str = _USER, *, password: str = PASSWORD) -> str:
        """The address of a database."""
        return f"postgresql://{_USER}:{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """A database of its own; returns its address."""
        self.query(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def query(self, sql: str, database: str = _USER) -> list[tuple]:
        """Run one statement beside the system under test."""
        import psycopg

        deadline = time.monotonic() + 30
        while True:
            try:
                with psycopg.connect(self.url(database), autocommit=True, connect_timeout=5) as connection:
                    cursor = connection.execute(sql)  # type: ignore[call-overload]
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self.programs / program), *map(str, arguments)]
        user = _USER if os.getuid() == 0 else None
        done = subprocess.run(command, user=user, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, cwd="/", timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
