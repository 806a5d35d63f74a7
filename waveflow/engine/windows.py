"""Synthesis of any length in bounded memory, as the mel arrives."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from waveflow.audio.refine import MelRefinement
from waveflow.engine.contract import Decoder
from waveflow.flow import Flow

# New frames in a window of a long mel, 12 seconds at 22 kHz. FrameGlow's context of 140 frames in
# all is then a seventh more work; WaveGlow's networks hold some 0.2 GB in such a window.
WINDOW_FRAMES = 1024


class WindowedSynthesis:
    """Draws, decodes and refines a mel that comes in pieces, equal to the whole up to rounding.

    Audio of the frames [begin, end) depends on the mel and the noise of a window around them
    that ends `left` frames before and `right` frames behind, counted from the layers, and on
    the running phase of the harmonic source. So the window is synthesised, its middle kept,
    and the phase carried on in float64. What the window's own ends do to it (zero padding,
    reflection) stays outside the middle, except at the ends of the utterance, where it belongs.

    Args:
        flow: gives the noise, the context and the phase.
        decoder: noise and mel to audio, equal to `flow.decode`.
        refinement: applied `steps` times.
        sigma: standard deviation of the noise.
        seeds: of the noise, one for each item.
        steps: of the refinement.
        lengths: (B,) frames of each item of a padded batch; None where all are whole.
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
    ) -> None:
        self.flow = flow
        self.decoder = decoder
        self.refinement = refinement
        self.sigma = sigma
        self.seeds = seeds
        self.steps = steps
        self.lengths = lengths
        self.left, self.right = window_context(flow, refinement, steps)
        # The mel from frame `_first` on that is still needed, and the frames that are done.
        self._mel: Tensor | None = None
        self._first = 0
        self._done = 0
        # The source's phase (B,) in cycles where frame `_phase_frame` begins.
        self._phase: Tensor | None = None
        self._phase_frame = 0

    def push(self, mel: Tensor, least_frames: int = WINDOW_FRAMES) -> Iterator[Tensor]:
        """Takes the next piece of the mel and gives what audio is final.

        Args:
            mel: (B, M, F), F >= 1.
            least_frames: fewer frames than that wait for the next piece.

        Returns:
            Audio (B, frames hop), in order, in pieces of at most
            max(WINDOW_FRAMES, least_frames) frames.
        """
        for piece in mel.split(WINDOW_FRAMES, 2):
            self._mel = piece if self._mel is None else torch.cat([self._mel, piece], 2)
            while (final := self._end - self.right - self._done) >= least_frames:
                yield self._next(min(final, max(WINDOW_FRAMES, least_frames)))

    def finish(self) -> Iterator[Tensor]:
        """The rest of the audio, once the mel has ended."""
        if self._end > self._done:
            yield self._next(self._end - self._done)

    @property
    def _end(self) -> int:
        return 0 if self._mel is None else self._first + self._mel.shape[2]

    @torch.inference_mode()
    def _next(self, n_frames: int) -> Tensor:
        """Audio of the next frames, of which the context is there or will never be."""
        begin, end = self._done, self._done + n_frames
        first, last = max(0, begin - self.left), min(self._end, end + self.right)
        start = self._phase_of(first)
        mel = self._mel = self._frames(first, self._end)
        self._first = first
        mel, lengths = mel[:, :, : last - first], self._lengths_from(first, last)
        self._done = end
        hop = self.flow.hop_length
        middle = slice((begin - first) * hop, (end - first) * hop)
        if lengths is None:
            return self._synthesised(mel, self.seeds, first, None, start)[:, middle]
        # Items that have ended cost nothing, and no decoder sees an empty one.
        items = (lengths > begin - first).nonzero()[:, 0]
        audio = mel.new_zeros(len(mel), n_frames * hop)
        if len(items):
            seeds = [self.seeds[i] for i in items.tolist()]
            start = None if start is None else start[items]
            made = self._synthesised(mel[items], seeds, first, lengths[items], start)
            audio[items] = made[:, middle]
        return audio

    def _synthesised(
        self,
        mel: Tensor,
        seeds: Sequence[int],
        first: int,
        lengths: Tensor | None,
        start: Tensor | None,
    ) -> Tensor:
        """Audio of a window (B, M, F) that begins with frame `first`."""
        noise = self.flow.noise(mel.shape[2], seeds, first).to(mel.device)
        audio = self.decoder(self.sigma * noise, mel, lengths, start)
        return self.refinement(audio, mel, self.steps, lengths)

    def _phase_of(self, first: int) -> Tensor | None:
        """The `start` of a window from frame `first`; None at the start of the utterance."""
        anchor = self.flow.conditioner.anchor
        if not (first and anchor):
            return None
        target = first + anchor
        begin, end = max(0, self._phase_frame - anchor), min(self._end, target + anchor)
        cycles = self.flow.cycles(self._frames(begin, end), self._lengths_from(begin, end))
        advance = cycles[:, self._phase_frame - begin : target - begin].sum(1)
        self._phase = (advance if self._phase is None else self._phase + advance).frac()
        self._phase_frame = target
        return self._phase

    def _frames(self, begin: int, end: int) -> Tensor:
        assert self._mel is not None
        return self._mel[:, :, begin - self._first : end - self._first]

    def _lengths_from(self, begin: int, end: int) -> Tensor | None:
        return None if self.lengths is None else (self.lengths - begin).clamp(0, end - begin)


def window_context(flow: Flow, refinement: MelRefinement, steps: int) -> tuple[int, int]:
    """Frames to the left and to the right that a frame of refined audio depends on."""
    left, right = flow.context
    more_left, more_right = refinement.context(steps)
    return left + more_left, right + more_right
