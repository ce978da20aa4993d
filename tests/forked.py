"""``theia`` as processes of its own, without the seconds that each would take to import torch and Lightning.

One process imports everything, once for all tests of a session, computes nothing, and forks itself for each command.
What it forks is a process like any other: with a session, arguments, files and an end of its own.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from events import PATIENCE_S

if TYPE_CHECKING:
    import pytest

_ADDRESS = "THEIA_TESTS_FORK_SERVER"
# What `theia fit`, `test`, `extract` and `ablate` import at some time.
_IMPORTED = (
    *(f"theia.cli.{name}" for name in ("lightning", "extract", "ablate")), "theia.scoring.scorers",
    "sklearn.decomposition", "sklearn.neighbors", "torch.utils.tensorboard", "matplotlib.backends.backend_agg",
)  # fmt: skip
# As `python -m theia`, for a sweep. It lasts as long as what it stands for, and ends as that does.
PROGRAM = (sys.executable, "-S", __file__)


class Command:
    """One command that runs, in a session of its own, as ``subprocess.Popen`` has it.

    Args:
        arguments: Those of ``theia``.
        files: Descriptors for its standard input, output and error, and others that it is to inherit.
        environment: Of the process.
        prepare: Module, function and arguments of what to call there first.

    Attributes:
        pid: Its number.
        returncode: Its exit status once it has been found to have ended, negative for a signal.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        files: Sequence[int],
        environment: Mapping[str, str],
        prepare: Sequence[str | int] = (),
    ) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.settimeout(PATIENCE_S)
        self._server.connect(environment[_ADDRESS])
        request = {
            "arguments": list(arguments),
            "prepare": list(prepare),
            "environment": dict(environment),
            "cwd": str(Path.cwd()),
        }
        content = json.dumps(request).encode()
        socket.send_fds(self._server, [len(content).to_bytes(8)], list(files))
        self._server.sendall(content)
        self.pid = self._receive()

    def poll(self) -> int | None:
        """Its exit status, if it has ended."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        if self.returncode is None:
            self.returncode = self._receive()
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)

    def _receive(self) -> int:
        received = b""
        while len(received) < 8:
            part = self._server.recv(8 - len(received))
            assert part, "the process that forks has ended"
            received += part
        return int.from_bytes(received, signed=True)


class Started(Command):
    """A command that a test has started. What it says goes into files."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], prepare: Sequence[str | int]) -> None:
        self._said = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (they are read as long as this is)
        with Path(os.devnull).open() as nothing:
            files = [nothing.fileno(), *(file.fileno() for file in self._said)]
            super().__init__(arguments, files, environment, prepare)

    @property
    def out(self) -> str:
        """What it has written to its standard output so far."""
        return self._read(0)

    @property
    def err(self) -> str:
        """What it has written to its standard error so far."""
        return self._read(1)

    def _read(self, index: int) -> str:
        file = self._said[index]
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode()


def theia(*arguments: str, path: Path | None = None, prepare: Sequence[str | int] = ()) -> Started:
    """Starts ``theia``.

    Args:
        arguments: Those of the command.
        path: Folder of modules that it finds beside those of this process.
        prepare: Module, function and arguments of what to call in the process before.
    """
    paths = [*([] if path is None else [str(path)]), *sys.path]
    environment = {**os.environ, _ADDRESS: _server(), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return Started(arguments, environment, prepare)


def function(module: str, name: str, *values: str | int) -> Started:
    """Starts a function of a module of the tests."""
    return theia(prepare=(module, name, *values))


def run(*arguments: str, path: Path | None = None) -> Started:
    """Runs ``theia`` to its end, which must be a good one."""
    done = theia(*arguments, path=path)
    assert done.wait() == 0, done.out + done.err
    return done


def environment() -> dict[str, str]:
    """Of a process that starts :data:`PROGRAM`."""
    return {**os.environ, _ADDRESS: _server()}


def sweeps(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Has the trainings and tests of sweeps in this process forked too."""
    monkeypatch.setenv(_ADDRESS, _server())
    _fork_jobs(monkeypatch.setattr)


def commands(monkeypatch: "pytest.MonkeyPatch", module: ModuleType) -> None:
    """Has the commands of ``theia`` forked that a module of the benchmarks starts by way of its ``command``."""
    monkeypatch.setenv(_ADDRESS, _server())
    whole = module.command

    def command(parts: Sequence[str]) -> list[str]:
        return [*PROGRAM, *parts[1:]] if parts[0] == "theia" else list(whole(parts))

    monkeypatch.setattr(module, "command", command)


@cache
def _server() -> str:
    """The address of the process that forks, which ends with this one."""
    if _ADDRESS in os.environ:  # of the process that forked this one
        return os.environ[_ADDRESS]
    address = str(Path(tempfile.mkdtemp(prefix="forked-")) / "socket")
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline(), "the process that forks could not import theia"
    _alive.append(server)
    return address


_alive: list["subprocess.Popen[bytes]"] = []


def _serve(address: str) -> Sequence[str]:
    """Returns in each process that is forked, with the arguments of its command, and at the end of all, with none."""
    for name in _IMPORTED:
        importlib.import_module(name)
    with contextlib.suppress(ModuleNotFoundError):  # only newer releases of other packages bring it along
        importlib.import_module("rich.console")
    gc.collect()
    gc.freeze()  # else every process would copy what its garbage collector looks through
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    python = Path(address).with_name("python")  # takes '-m theia' for what PROGRAM stands for
    python.write_text(f'#!/bin/sh\nshift 2\nexec {shlex.join(PROGRAM)} "$@"\n')
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"ready\n")
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            with client:
                if os.fork() == 0:
                    listener.close()
                    return _wait_for_child(client)
    shutil.rmtree(Path(address).parent)
    os._exit(0)


def _wait_for_child(client: socket.socket) -> Sequence[str]:
    """Forks the command itself, in which it returns, and tells its number and its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(client, 8, 64)
    with client.makefile("rb") as content:
        request = json.loads(content.read(int.from_bytes(size)))
    child = os.fork()
    if child == 0:
        client.close()
        return _become(request, files)
    for file in files:
        os.close(file)
    with contextlib.suppress(OSError):  # whoever wanted to know has ended
        client.sendall(child.to_bytes(8))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        client.sendall(status.to_bytes(8, signed=True))
    os._exit(0)


def _become(request: dict[str, Any], files: Sequence[int]) -> Sequence[str]:
    """Makes this process that of ``python -m theia``."""
    os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = dict.fromkeys([*filter(None, paths), *sys.path])
    # A shell has what it runs in the background ignore Ctrl-C, the tests included.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What Lightning starts anew for a second device, and how.
    sys.modules["__main__"] = importlib.import_module("theia.__main__")
    sys.argv = [str(sys.modules["__main__"].__file__), *request["arguments"]]
    sys.executable = str(Path(os.environ[_ADDRESS]).with_name("python"))
    if request["prepare"]:
        module, function, *values = request["prepare"]
        getattr(importlib.import_module(module), function)(*values)
    if request["arguments"][:1] == ["ablate"]:
        _fork_jobs(setattr)
    arguments: list[str] = request["arguments"]
    return arguments


def _fork_jobs(setattr: Callable[[object, str, object], None]) -> None:
    launch, sweep = (importlib.import_module(f"theia.ablation.{name}") for name in ("launch", "sweep"))
    setattr(sweep, "Job", partial(launch.Job, program=PROGRAM))
    setattr(launch, "_GRACE_S", PATIENCE_S)


def _stand_for(arguments: Sequence[str]) -> None:
    """Runs a command with the files of this process, and ends as it does."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    inherited = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (names are enough)
        with contextlib.suppress(OSError):  # the listing's own
            os.fstat(int(name))
            inherited.append(int(name))
    command = Command(arguments, sorted(inherited), os.environ)

    def pass_on(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    status = command.wait()
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        _stand_for(sys.argv[1:])
    arguments = _serve(sys.argv[2])
    from theia.cli.main import main

    sys.exit(main(arguments) if arguments else 0)
