"""Prefetch: the batches of the steps to come, drawn in the background while a step is computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Draws `draw(step)` ahead of time in threads; the order of the threads changes nothing.

    A batch is a function of its step alone (`SegmentSampler.batch`), so any step may be asked
    for at any time: what was drawn ahead for others is then forgotten. numpy and the reading of
    memory-mapped pages let go of the interpreter's lock, so threads are enough.

    Args:
        draw: makes the item of a step; called from several threads.
        ahead: steps that are drawn ahead.
    """

    def __init__(self, draw: Callable[[int], Item], ahead: int = 3) -> None:
        self._draw = draw
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(2, "prefetch")
        self._drawn: dict[int, Future[Item]] = {}
        self._waited_seconds = 0.0
        self._since = time.perf_counter()

    def get(self, step: int) -> Item:
        """The item of a step; those of the next `ahead` steps are begun."""
        begin = time.perf_counter()
        wanted = range(step, step + self._ahead + 1)
        self._drawn = {s: self._drawn.get(s) or self._pool.submit(self._draw, s) for s in wanted}
        item = self._drawn.pop(step).result()
        self._waited_seconds += time.perf_counter() - begin
        return item

    def waiting_share(self) -> float:
        """The share of the clock, since the last call, that `get` kept its caller waiting."""
        now = time.perf_counter()
        share = self._waited_seconds / max(now - self._since, 1e-9)
        self._waited_seconds, self._since = 0.0, now
        return share
