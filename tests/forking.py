"""Processes that share this one's imports, so that each starts at once.

They cannot train if this one has: autograd refuses to work in a forked process.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from waveflow.cli.main import main


class Outcome(NamedTuple):
    """The end of a process: its exit status, or its signal as a negative number."""

    status: int
    out: str
    err: str


class Forked:
    """A function in a process of its own.

    Args:
        action: returns the exit status.
        folder: where the output goes.
        stdin, stdout: file descriptors in the place of the usual ones.
        close: file descriptors that the process must not keep open.
    """

    def __init__(
        self,
        action: Callable[[], int],
        folder: Path,
        stdin: int | None = None,
        stdout: int | None = None,
        close: Sequence[int] = (),
    ) -> None:
        self._files = [folder / "stdout", folder / "stderr"]
        out, err = (os.open(path, os.O_CREAT | os.O_WRONLY) for path in self._files)
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in close:
                os.close(descriptor)
            _run(action, (stdin, stdout or out, err))
        os.close(out)
        os.close(err)

    def kill(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def wait(self) -> Outcome:
        _, status = os.waitpid(self.pid, 0)
        return Outcome(os.waitstatus_to_exitcode(status), *(f.read_text() for f in self._files))


def _run(action: Callable[[], int], descriptors: tuple[int | None, int, int]) -> NoReturn:
    status = 70
    try:
        for number, descriptor in enumerate(descriptors):
            if descriptor is not None:
                os.dup2(descriptor, number)
        # Those of pytest capture what this process should write.
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0]) for n in range(3))
        status = action()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def command(args: Sequence[str | Path]) -> int:
    """`waveflow ARGS`."""
    return main([str(arg) for arg in args])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fork_group(n: int, action: Callable[[int], int], folder: Path) -> list[Forked]:
    """A group of n processes, as torchrun describes it to them; `action` gets the rank."""
    port = free_port()

    def member(rank: int) -> int:
        os.environ |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return action(rank)

    folders = [folder / f"rank{rank}" for rank in range(n)]
    for own in folders:
        own.mkdir()
    return [Forked(partial(member, rank), own) for rank, own in enumerate(folders)]
