"""Sums over the processes that train one model together, by torch.distributed.

Alone, a process may call everything here too: its sums are its own values.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from waveflow.errors import ConfigError, WaveflowError
from waveflow.objective import Share
from waveflow.processes import join_group, store_errors

Result = TypeVar("Result")

# The others wait while rank 0 prepares a corpus. torchrun notices if a worker dies.
_TIMEOUT = timedelta(hours=12)
# Values in one message: enough to fill a network, few beside a model's gradients.
_BUCKET = 2**23


def rank() -> int:
    """Returns the number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Returns whether this is rank 0, which writes files and reports."""
    return rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Connects the processes that torchrun started for the time of the block.

    Args:
        device: device of the gradients. Gloo carries tensors on a CPU, NCCL those on GPUs.

    Raises:
        ConfigError: the environment makes no sense, or the others cannot be reached.
    """
    group = join_group()
    if group.store is None:
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    group.store.set_timeout(_TIMEOUT)
    with store_errors():
        dist.init_process_group(
            backend,
            store=group.store,
            rank=group.rank,
            world_size=group.world_size,
            timeout=_TIMEOUT,
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _other_processes() -> Iterator[None]:
    """Turns a failed message into one line."""
    try:
        yield
    except RuntimeError as error:
        raise WaveflowError("another process of this run has ended: its error says why") from error


def own_share(total: int) -> Share:
    """Returns the items of a global batch that this process computes.

    Raises:
        ConfigError: there are fewer items than processes.
    """
    if total < world_size():
        raise ConfigError(
            f"batch_size {total} is too small for {world_size()} processes: give each an item"
        )
    return Share(0, total, total).split(world_size())[rank()]


def all_sum(values: Tensor) -> Tensor:
    """Sums tensors of one shape over all processes, in place; each gets the same bits."""
    if world_size() > 1:
        with _other_processes():
            dist.all_reduce(values)
    return values


def in_any(*flags: bool) -> list[bool]:
    """Returns for each flag whether it is true in any process: the same answer for all."""
    return (all_sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients over all processes, whose graphs are the same."""
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
    """Calls `work` in rank 0 alone; all processes return its result or raise its error."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except WaveflowError as error:
            outcome[1] = error
    with _other_processes():
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
