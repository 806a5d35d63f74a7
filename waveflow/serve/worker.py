"""Worker: one thread that computes what all requests wait for.

A model uses all threads of the machine, so two syntheses at once would only slow each other down.
Requests take turns, a piece of audio each: a short one does not wait for the end of a long one.
Mels that wait together are spoken together where that pays (engine/together.py).
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from waveflow.engine.options import SynthesisOptions
from waveflow.engine.together import batches, speak_together
from waveflow.engine.vocoder import Vocoder

Pieces = Iterator[np.ndarray]


class Busy(Exception):
    """Too many requests wait already."""


class Gone(Exception):
    """The client has left."""


class TooLate(Exception):
    """A request was not done within its time."""


@dataclass(eq=False)
class Request:
    """A request to the worker, and the audio that comes of it.

    Attributes:
        deadline: by time.monotonic().
    """

    deadline: float
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    answers: "asyncio.Queue[np.ndarray | Exception | None]" = field(default_factory=asyncio.Queue)
    is_given_up: bool = False

    def answer(self, item: "np.ndarray | Exception | None") -> None:
        """Hands over a piece, the error that ends the audio, or None for its end."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.answers.put_nowait, item)

    async def audio(self) -> AsyncIterator[np.ndarray]:
        """The pieces, as they are made.

        Raises:
            WaveflowError: what was asked for is wrong.
            TooLate: the time is over.
        """
        try:
            while True:
                if self.answers.empty():  # what is there already is never late
                    try:
                        async with asyncio.timeout(self.deadline - time.monotonic()):
                            item = await self.answers.get()
                    except TimeoutError as error:
                        raise TooLate from error
                else:
                    item = self.answers.get_nowait()
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_given_up = True


@dataclass(eq=False, kw_only=True)
class PiecesRequest(Request):
    """A request for audio that `pieces` makes, in the worker's thread, a piece at each turn."""

    pieces: Callable[[], Pieces]


@dataclass(eq=False, kw_only=True)
class MelRequest(Request):
    """A request for the speech of a mel (M, F) that may be spoken together with others."""

    mel: np.ndarray
    options: SynthesisOptions

    @property
    def n_frames(self) -> int:
        return self.mel.shape[1]

    def is_like(self, other: "MelRequest") -> bool:
        """Whether the two differ in seed and length only."""
        same = self.options.changed({"seed": 0}) == other.options.changed({"seed": 0})
        return same and len(self.mel) == len(other.mel)


class Worker:
    """Computes audio for requests, in a thread of its own.

    Args:
        vocoder: decodes batches of mels.
        most_waiting: requests that may wait or take turns.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        vocoder: Vocoder,
        most_waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.vocoder = vocoder
        self.most_waiting = most_waiting
        self.on_batch = on_batch
        self.n_open = 0
        self._arrived: queue.Queue[Request | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="waveflow worker", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Puts a request into the line.

        Raises:
            Busy: the line is full.
        """
        with self._lock:
            if self.is_full:
                raise Busy
            self.n_open += 1
        self._arrived.put(request)

    @property
    def is_full(self) -> bool:
        """Whether no further request may wait."""
        return self.n_open >= self.most_waiting

    @property
    def is_alive(self) -> bool:
        """Whether it still computes."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the thread, after what it computes now."""
        self._arrived.put(None)
        self._thread.join()

    def _work(self) -> None:
        turns: deque[tuple[Request, Pieces]] = deque()
        mels: list[MelRequest] = []
        while True:
            arrived = self._new_requests(wait=not turns and not mels)
            if None in arrived:
                return
            for request in arrived:
                if isinstance(request, MelRequest):
                    mels.append(request)
                elif isinstance(request, PiecesRequest):
                    turns.append((request, request.pieces()))
            if mels:
                batch = self._next_batch(mels)
                mels = [mel for mel in mels if mel not in batch]
                self._speak_together(batch)
            if turns:
                request, pieces = turns.popleft()
                if self._next_piece(request, pieces):
                    turns.append((request, pieces))

    def _new_requests(self, wait: bool) -> "list[Request | None]":
        found = [self._arrived.get()] if wait else []
        while not self._arrived.empty():
            found.append(self._arrived.get_nowait())
        return found

    def _next_batch(self, mels: list[MelRequest]) -> list[MelRequest]:
        """The oldest mel, and those that wait with it."""
        alike = [mel for mel in mels if mel.is_like(mels[0])]
        for batch in batches([mel.n_frames for mel in alike], self.vocoder.device.type):
            if 0 in batch:
                return [alike[i] for i in batch]
        raise AssertionError

    def _speak_together(self, batch: list[MelRequest]) -> None:
        batch = [request for request in batch if not self._is_over(request)]
        if not batch:
            return
        self.on_batch(len(batch))
        found = speak_together(self.vocoder, [r.mel for r in batch], [r.options for r in batch])
        for request, speech in zip(batch, found, strict=True):
            if isinstance(speech, Exception):
                self._end(request, speech)
                continue
            try:
                request.answer(speech.audio.cpu().numpy())
            except Exception as error:  # of the device
                self._end(request, error)
            else:
                self._end(request, None)

    def _next_piece(self, request: Request, pieces: Pieces) -> bool:
        """Hands over the next piece; returns whether there may be more."""
        if self._is_over(request):
            return False
        try:
            request.answer(next(pieces))
        except StopIteration:
            self._end(request, None)
            return False
        except Exception as error:
            self._end(request, error)
            return False
        return True

    def _is_over(self, request: Request) -> bool:
        if request.is_given_up or time.monotonic() > request.deadline:
            self._end(request, TooLate())
            return True
        return False

    def _end(self, request: Request, error: Exception | None) -> None:
        with self._lock:
            self.n_open -= 1
        request.answer(error)
