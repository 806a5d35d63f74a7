"""The share of a job that falls to this process, where `torchrun` has started several."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from waveflow.cli.console import counting
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

# Seconds between looks at who has arrived: all wait for the slowest, so nobody is hurried.
_POLL = 0.2

# Characters of ASCII at once: a store refuses values of 8 MiB and more.
_PIECE = 4 * 2**20


def shard() -> tuple[int, int]:
    """This process's rank, from 0 on, and the number of processes: (0, 1) without torchrun.

    Raises:
        ConfigError: the environment's RANK and WORLD_SIZE are no such pair.
    """
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        pair = int(rank), int(world_size)
    except ValueError:
        pair = (-1, 0)
    if not 0 <= pair[0] < pair[1]:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world_size} are no rank of a number of processes: "
            "start the command with torchrun, or unset both"
        )
    return pair


def check_alone(what: str) -> None:
    """Raises ConfigError under torchrun, for what is no folder and cannot be shared."""
    if shard()[1] > 1:
        raise ConfigError(f"{what} is nothing for several processes to share: leave torchrun out")


def local_device(device: str) -> str:
    """The device that is meant: under torchrun, `cuda` is a GPU of its own for each process."""
    if device == "cuda" and shard()[1] > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


class Group(NamedTuple):
    """The processes that share a job, seen from one of them; `join_group` makes it.

    Attributes:
        rank: of this process, from 0 on. Rank 0 reports for all.
        world_size: number of processes.
        store: what they talk through; None where this process is the only one.
    """

    rank: int
    world_size: int
    store: "Store | None"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every world_size-th item.

        What is done already must be left out after this, not before: processes that start at
        different times see different things done, and would not divide the rest alike.
        """
        return items[self.rank :: self.world_size]

    def counting(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar over the share of rank 0; those of all processes would overwrite one another."""
        if self.rank > 0:
            return nullcontext(lambda done, total: None)
        share = f" of process 1 of {self.world_size}" if self.world_size > 1 else ""
        return counting(f"{what}{share}")

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """Waits for all processes, and gives rank 0 their values by rank; None to the others.

        There is no time limit: one may be hours behind, and torchrun ends all when one dies.

        Args:
            name: of this gathering; each has its own.
            value: what JSON can hold, NaN included.

        Raises:
            ConfigError: the store, which rank 0 or its torchrun keeps, cannot be reached.
        """
        if self.store is None:
            return [value]
        text = json.dumps(value)
        with _reached():
            _send(self.store, f"{name}/{self.rank}", text)
            _arrive(self.store, f"{name}/sent", self.world_size)
            if self.rank > 0:
                self.store.add(f"{name}/left", 1)
                return None
            gathered = [_receive(self.store, f"{name}/{rank}") for rank in range(self.world_size)]
            # The store may end with this process: nobody may still ask it something then.
            _arrive(self.store, f"{name}/left", self.world_size)
        return [json.loads(data) for data in gathered]


ALONE = Group(rank=0, world_size=1, store=None)


def join_group() -> Group:
    """Connects the processes that torchrun has started: all of them call it, once, at the start.

    Raises:
        ConfigError: the environment makes no sense, or the others cannot be reached.
    """
    rank, world_size = shard()
    return Group(rank, world_size, _connect()) if world_size > 1 else ALONE


def merge(shares: Sequence[Sequence[T]]) -> list[T]:
    """The items in their order again, from the shares by rank."""
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def _connect() -> "Store":
    from torch.distributed import PrefixStore, rendezvous

    with _reached():
        store, _, _ = next(rendezvous("env://"))
    # torchrun keeps one store for all its attempts: what the dead counted there must not count.
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _send(store: "Store", key: str, text: str) -> None:
    starts = range(0, len(text), _PIECE)
    for number, start in enumerate(starts):
        store.set(f"{key}/{number}", text[start : start + _PIECE])
    store.set(key, str(len(starts)))


def _receive(store: "Store", key: str) -> bytes:
    return b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))


def _arrive(store: "Store", key: str, expected: int) -> None:
    """Counts this process as arrived, and waits for the others."""
    store.add(key, 1)
    # Looked up again and again, since a wait inside the store would not hear Ctrl-C.
    while store.add(key, 0) < expected:
        time.sleep(_POLL)


@contextmanager
def _reached() -> Iterator[None]:
    """Says what a failure of the store means."""
    from torch.distributed import DistError

    try:
        yield
    # ValueError: the variables that say where the store is are missing or wrong.
    except (DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the other processes of torchrun cannot be reached: {reason}") from error
