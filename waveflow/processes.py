"""The processes of one job: who they are, which part each does, and how they exchange results.

`torchrun` starts them and describes them in environment variables. Torch is imported only where
several processes meet, so a command that runs alone starts without it.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

# Seconds between two looks into the store. A wait inside the store would not hear Ctrl-C.
_POLL_SECONDS = 0.1

# Characters of ASCII in one message: a store refuses values of 8 MiB and more.
_PIECE = 4 * 2**20


def own_place() -> tuple[int, int]:
    """Returns this process's rank, from 0 on, and the number of processes: (0, 1) for one alone.

    Raises:
        ConfigError: RANK and WORLD_SIZE in the environment contradict each other.
    """
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        place = int(rank), int(world_size)
    except ValueError:
        place = (-1, 0)
    if not 0 <= place[0] < place[1]:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world_size} do not describe a process: "
            "start the command with torchrun, or unset both"
        )
    return place


def was_restarted() -> bool:
    """Returns whether torchrun has started this process again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_alone(what: str) -> None:
    """Raises ConfigError if torchrun started several processes: `what` cannot be shared."""
    if own_place()[1] > 1:
        raise ConfigError(f"several processes cannot share {what}: leave torchrun out")


def local_device(device: str) -> str:
    """Returns the device's full name: under torchrun, `cuda` is this process's own GPU."""
    if device == "cuda" and own_place()[1] > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


class Group(NamedTuple):
    """The processes that share a job, seen from one of them; `join_group` makes it.

    Attributes:
        rank: number of this process, from 0 on. Rank 0 reports for all.
        world_size: number of processes.
        store: key-value store through which they talk; None for a process alone.
    """

    rank: int
    world_size: int
    store: "Store | None"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's part: every world_size-th item.

        Take the share first and leave out finished items after that. Processes that start at
        different times see different items finished, and would divide the rest differently.
        """
        return items[self.rank :: self.world_size]

    def main_first(self, name: str, work: Callable[[], T]) -> T:
        """Calls `work` in rank 0, and in the others when rank 0 is done.

        For work that leaves files which a second call finds. If rank 0 fails, its process ends,
        and torchrun ends the others.

        Args:
            name: a name that no other call of this method or of `gather` has.
            work: a function that all processes call.
        """
        if self.store is None:
            return work()
        if self.rank > 0:
            with store_errors():
                _wait_for(self.store, f"{name}/done")
                self.store.add(f"{name}/seen", 1)
            return work()
        result = work()
        with store_errors():
            self.store.set(f"{name}/done", "")
            # The store may end with this process, so the others have to hear of it first.
            _arrive(self.store, f"{name}/seen", self.world_size)
        return result

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """Waits for all processes; returns their values by rank in rank 0, None in the others.

        There is no time limit: a process may be hours behind, and torchrun ends all if one dies.

        Args:
            name: a name that no other call of this method or of `main_first` has.
            value: a value that JSON can hold, NaN included.

        Raises:
            ConfigError: the store, which rank 0 or its torchrun keeps, cannot be reached.
        """
        if self.store is None:
            return [value]
        text = json.dumps(value)
        with store_errors():
            _send(self.store, f"{name}/{self.rank}", text)
            _arrive(self.store, f"{name}/sent", self.world_size)
            if self.rank > 0:
                self.store.add(f"{name}/left", 1)
                return None
            gathered = [_receive(self.store, f"{name}/{rank}") for rank in range(self.world_size)]
            # The store may end with this process, so the others have to leave first.
            _arrive(self.store, f"{name}/left", self.world_size)
        return [json.loads(data) for data in gathered]


ALONE = Group(rank=0, world_size=1, store=None)


def join_group() -> Group:
    """Connects the processes of a job. Each calls it once, at the start.

    Raises:
        ConfigError: the environment makes no sense, or the others cannot be reached.
    """
    rank, world_size = own_place()
    return Group(rank, world_size, _connect(rank, world_size)) if world_size > 1 else ALONE


def merge(shares: Sequence[Sequence[T]]) -> list[T]:
    """Returns the items in their first order, from the shares by rank."""
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


@contextmanager
def store_errors() -> Iterator[None]:
    """Turns errors of the store into one line."""
    try:
        yield
    # ValueError: the variables with the store's address are missing or wrong.
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the other processes of torchrun cannot be reached: {reason}") from error


def _connect(rank: int, world_size: int) -> "Store":
    from torch.distributed import rendezvous

    with store_errors():
        store, _, _ = next(rendezvous("env://"))
        return empty_part(store, rank, world_size)


def empty_part(store: "Store", rank: int, world_size: int) -> "Store":
    """Returns a part of torchrun's store that is empty and the same for all processes.

    torchrun keeps one store for all attempts (--max-restarts), so the store may hold messages of
    processes that are dead. Rank 0 therefore makes up a name for a part of the store. Each other
    process writes a word that it has made up, and rank 0 answers under that word with the name
    until all have confirmed it. Nobody confirms the word of a dead process.
    """
    from torch.distributed import PrefixStore

    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"word/{rank}", own)
        name = _wait_for(store, f"reply/{own}").decode()
        store.set(f"{name}/confirmed/{rank}", "")
        return PrefixStore(name, store)
    silent = set(range(1, world_size))
    while silent:
        for other in sorted(silent):
            if store.check([f"word/{other}"]):
                store.set(f"reply/{store.get(f'word/{other}').decode()}", own)
            if store.check([f"{own}/confirmed/{other}"]):
                silent.remove(other)
        time.sleep(_POLL_SECONDS)
    return PrefixStore(own, store)


def _wait_for(store: "Store", key: str) -> bytes:
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    return store.get(key)


def _arrive(store: "Store", key: str, expected: int) -> None:
    """Counts this process as arrived, and waits for the others."""
    store.add(key, 1)
    while store.add(key, 0) < expected:
        time.sleep(_POLL_SECONDS)


def _send(store: "Store", key: str, text: str) -> None:
    starts = range(0, len(text), _PIECE)
    for number, start in enumerate(starts):
        store.set(f"{key}/{number}", text[start : start + _PIECE])
    store.set(key, str(len(starts)))


def _receive(store: "Store", key: str) -> bytes:
    return b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))
