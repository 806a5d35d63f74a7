"""One process of many: what the workers of torchrun share, by torch.distributed alone.

Everything here also works in a process of its own, where it does nothing.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from waveflow.errors import ConfigError, WaveflowError
from waveflow.objective import Share

Result = TypeVar("Result")

# Others wait while rank 0 prepares a corpus. That a worker has died is torchrun's to notice.
_TIMEOUT = timedelta(hours=12)
_POLL_SECONDS = 0.02
# Values in a message: large enough to fill a network, small beside a model's gradients.
_BUCKET = 2**23


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def was_restarted() -> bool:
    """Whether torchrun has started this worker again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, while it is open.

    Args:
        device: that gradients are on; gloo carries what is on a CPU, NCCL what is on GPUs.

    Raises:
        ConfigError: the environment is not torchrun's, or the others cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        store = empty_part(store, number, count)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=_TIMEOUT
        )
    # ValueError: the variables that say where the others are are missing or wrong.
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the other processes of torchrun cannot be reached: {reason}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def empty_part(store: dist.Store, number: int, count: int) -> dist.Store:
    """A part of torchrun's store, the same for all `count` processes, that holds nothing yet.

    torchrun keeps one store for all its attempts (--max-restarts): who looked for the address of
    another there could find that of one that is dead. So rank 0 makes up a name for a part of
    the store. It tells the name in reply to a word that each of the others has made up, until
    all have confirmed it; a word of the dead is never confirmed.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"word/{number}", own)
        name = store.get(f"reply/{own}").decode()
        store.set(f"{name}/confirmed/{number}", "")
        return dist.PrefixStore(name, store)
    silent = set(range(1, count))
    while silent:
        for other in sorted(silent):
            if store.check([f"word/{other}"]):
                store.set(f"reply/{store.get(f'word/{other}').decode()}", own)
            if store.check([f"{own}/confirmed/{other}"]):
                silent.remove(other)
        time.sleep(_POLL_SECONDS)
    return dist.PrefixStore(own, store)


@contextmanager
def _others() -> Iterator[None]:
    """What it means that a message could not be sent."""
    try:
        yield
    except RuntimeError as error:
        raise WaveflowError("another process of this run has ended: its error says why") from error


def own_share(total: int) -> Share:
    """The items of a global batch that this process computes.

    Raises:
        ConfigError: there are fewer items than processes.
    """
    if total < world_size():
        raise ConfigError(
            f"batch_size {total} is too small for {world_size()} processes: give each an item"
        )
    return Share(0, total, total).split(world_size())[rank()]


def all_sum(values: Tensor) -> Tensor:
    """The sum over all processes of tensors of one shape, in place; the same bits on each."""
    if world_size() > 1:
        with _others():
            dist.all_reduce(values)
    return values


def in_any(*flags: bool) -> list[bool]:
    """Which of the flags are true in at least one process: one answer for all."""
    return (all_sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all processes, which have the same graph and so the same ones."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    gradients = [p.grad for p in parameters if p.grad is not None]
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        if index == len(gradients) - 1 or sum(map(Tensor.numel, bucket)) >= _BUCKET:
            summed = all_sum(torch.cat([part.flatten() for part in bucket]))
            for part, values in zip(
                bucket, summed.split([*map(Tensor.numel, bucket)]), strict=True
            ):
                part.copy_(values.view_as(part))
            bucket = []


def on_main(work: Callable[[], Result]) -> Result:
    """Does something in rank 0 alone; its result, or its error, is that of all."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except WaveflowError as error:
            outcome[1] = error
    with _others():
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
