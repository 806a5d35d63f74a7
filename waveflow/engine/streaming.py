"""Synthesis of any length in bounded memory, as the mel arrives."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from waveflow.audio.refine import MelRefinement
from waveflow.context import Context
from waveflow.engine.contract import Decoder
from waveflow.flow import Flow, State, select_items

# New frames in a window of a long mel, 12 seconds at 22 kHz. FrameGlow's context of 140 frames in
# all is then a seventh more work; WaveGlow's networks hold some 0.2 GB in such a window.
WINDOW_FRAMES = 1024


class WindowedSynthesis:
    """Draws, decodes and refines a mel that comes in pieces, equal to the whole up to rounding.

    Audio of the frames [begin, end) depends on the mel and the noise of a window around them:
    `left` frames before and `right` frames behind, which the flow's parts declare, and on the
    conditioner's state, which is carried from window to window. So the window is synthesised and
    its middle kept. The middle sees nothing of the window's own ends (zero padding, reflection),
    except where the utterance begins or ends there.

    A context without bound is kept whole: with `left` infinite each window begins with the
    utterance, with `right` infinite no audio is final before the mel ends.

    Args:
        flow: gives the noise, the context and the state.
        decoder: noise and mel to audio, equal to `flow.decode`.
        refinement: applied `steps` times.
        sigma: standard deviation of the noise.
        seeds: of the noise, one for each item.
        steps: of the refinement.
        lengths: (B,) frames of each item of a padded batch; None where all are whole.
        look_ahead: frames of the mel behind a frame of audio to wait for, if that is fewer than
            the model sees. The last frames of each piece are then made as if the mel ended soon.

    Raises:
        ConfigError: a part of the flow declares no context.
    """

    def __init__(
        self,
        flow: Flow,
        decoder: Decoder,
        refinement: MelRefinement,
        sigma: float,
        seeds: Sequence[int],
        steps: int,
        lengths: Tensor | None = None,
        look_ahead: float = math.inf,
    ) -> None:
        self.flow = flow
        self.decoder = decoder
        self.refinement = refinement
        self.sigma = sigma
        self.seeds = seeds
        self.steps = steps
        self.lengths = lengths
        self.left, right = window_context(flow, refinement, steps)
        self.right = min(right, look_ahead)
        # The mel from frame `_first` on, where the next window begins, with the state there.
        self._mel: Tensor | None = None
        self._first = 0
        self._state: State = None
        # Audio of the window, not refined.
        self._drawn = torch.empty(0)
        self._done = 0

    def push(self, mel: Tensor, least_frames: int | None = None) -> Iterator[Tensor]:
        """Takes the next piece of the mel and gives the audio that is final.

        Args:
            mel: (B, M, F), F >= 1.
            least_frames: fewer frames than that wait for the next piece; default WINDOW_FRAMES.

        Returns:
            Audio (B, frames hop), in order, in pieces of at most
            max(WINDOW_FRAMES, least_frames) frames.
        """
        least = WINDOW_FRAMES if least_frames is None else least_frames
        for piece in mel.split(WINDOW_FRAMES, 2):
            self._mel = piece if self._mel is None else torch.cat([self._mel, piece], 2)
            while (final := self._end - self.right - self._done) >= least:
                n_frames = min(int(final), max(WINDOW_FRAMES, least))
                yield self._next(n_frames)
                self._move_on()

    def finish(self) -> Iterator[Tensor]:
        """The rest of the audio, once the mel has ended."""
        if self._end > self._done:
            yield self._next(self._end - self._done)

    @property
    def _end(self) -> int:
        return 0 if self._mel is None else self._first + self._mel.shape[2]

    @torch.inference_mode()
    def _next(self, n_frames: int) -> Tensor:
        """Audio of the next frames, whose context has arrived or lies beyond the utterance."""
        begin, end = self._done, self._done + n_frames
        first, last = self._first, int(min(self._end, end + self.right))
        assert self._mel is not None
        mel, lengths = self._mel[:, :, : last - first], self._lengths(first, last)
        self._done = end
        hop = self.flow.hop_length
        middle = slice((begin - first) * hop, (end - first) * hop)
        if lengths is None:
            self._drawn, audio = self._synthesised(mel, self.seeds, None, self._state)
            return audio[:, middle]
        # Items that have ended cost nothing, and no decoder sees an empty one.
        items = (lengths > begin - first).nonzero()[:, 0]
        self._drawn = mel.new_zeros(len(mel), mel.shape[2] * hop)
        audio = torch.zeros_like(self._drawn)
        if len(items):
            seeds = [self.seeds[i] for i in items.tolist()]
            state = select_items(self._state, items)
            self._drawn[items], audio[items] = self._synthesised(
                mel[items], seeds, lengths[items], state
            )
        return audio[:, middle]

    def _synthesised(
        self, mel: Tensor, seeds: Sequence[int], lengths: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Audio of a window (B, M, F) that begins with frame `_first`, drawn and refined."""
        noise = self.flow.noise(mel.shape[2], seeds, self._first).to(mel.device)
        drawn = self.decoder(noise, mel, lengths, state, self.sigma)
        return drawn, self.refinement(drawn, mel, self.steps, lengths)

    @torch.inference_mode()
    def _move_on(self) -> None:
        """Drops the frames before the next window and carries the state to it."""
        if self.left == math.inf:
            return
        assert self._mel is not None
        n_frames = max(0, self._done - int(self.left) - self._first)
        lengths = self._lengths(self._first, self._end)
        final = self._drawn[:, : (self._done - self._first) * self.flow.hop_length]
        self._state = self.flow.carry(self._mel, lengths, self._state, n_frames, final)
        self._mel = self._mel[:, :, n_frames:]
        self._first += n_frames

    def _lengths(self, begin: int, end: int) -> Tensor | None:
        """The frames of each item from `begin` to `end`."""
        return None if self.lengths is None else (self.lengths - begin).clamp(0, end - begin)


def window_context(flow: Flow, refinement: MelRefinement, steps: int) -> Context:
    """Frames to the left and to the right that a frame of refined audio depends on."""
    return flow.context + refinement.context_of_steps(steps)


def delayed(pieces: Iterator[Tensor], n_samples: Callable[[], int]) -> Iterator[Tensor]:
    """Pieces (..., n) of audio moved by some samples, back if negative; as many in all.

    Zeros come in the place of what is missing at an end.

    Args:
        pieces: the audio.
        n_samples: gives the delay, once the first piece is there.
    """
    held, skip, owed = None, 0, 0
    for piece in pieces:
        if held is None:
            owed = n_samples()
            held, skip = piece[..., :0], max(-owed, 0)
            if owed > 0:
                held = piece.new_zeros(*piece.shape[:-1], owed)
        piece = torch.cat([held, piece], -1) if held.shape[-1] else piece
        kept = piece[..., min(skip, piece.shape[-1]) : piece.shape[-1] - max(owed, 0)]
        skip = max(skip - piece.shape[-1], 0)
        held = piece[..., piece.shape[-1] - max(owed, 0) :]
        if kept.shape[-1]:
            yield kept
    if held is not None and owed < 0:
        yield held.new_zeros(*held.shape[:-1], -owed - skip)
