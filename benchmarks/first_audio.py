"""How long a stream waits before it can play: seconds of mel, and seconds of work on them.

python benchmarks/first_audio.py frameglow-cc0 --look-ahead 0.3 0.1 0.05
"""

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import lab
from waveflow.cli.console import show_table
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError

# A stream is fed pieces of so many seconds.
PIECE_SECONDS = 0.05
# Of the speech in which a stream is compared with the whole.
SPEECH_SECONDS = 3.0


@torch.inference_mode()
def first_audio(vocoder: Vocoder, look_ahead: float | None = None) -> tuple[float, float]:
    """Seconds of mel that a stream reads before its first audio, and of the clock until then."""
    piece = lab.speech(vocoder.mel_config, PIECE_SECONDS, str(vocoder.device))[0]
    n_frames = 0

    def endless() -> Iterator[Tensor]:
        nonlocal n_frames
        while True:
            n_frames += piece.shape[1]
            yield piece

    begin = time.perf_counter()
    next(vocoder.stream(endless(), look_ahead=look_ahead)).cpu()
    seconds = time.perf_counter() - begin
    return n_frames * vocoder.hop_length / vocoder.sample_rate, seconds


@torch.inference_mode()
def difference(vocoder: Vocoder, look_ahead: float | None) -> float:
    """Decibels of a stream's difference from the whole, below the whole."""
    mel = lab.speech(vocoder.mel_config, SPEECH_SECONDS, str(vocoder.device))[0]
    whole = vocoder(mel)
    pieces = torch.cat(list(vocoder.stream(mel.split(4, 1), look_ahead=look_ahead)))
    noise = (pieces - whole).square().mean() / whole.square().mean()
    return 10 * noise.clamp_min(1e-15).log10().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the mel that must be there, the part of it that is look-ahead, and the work."""
    parser = lab.parser(__doc__, "precision", "runs", "device")
    parser.add_argument(
        "--look-ahead", nargs="*", type=float, default=[], help="also with so many seconds of it"
    )
    args = parser.parse_args(argv)
    rows = [("model", "path", "mel s", "look-ahead s", "work s", "difference dB")]
    with lab.folders(args.models) as found:
        systems = lab.load_all(found, args.precision, device=args.device)
    for (model, path), vocoder in systems.items():
        if not isinstance(vocoder, Vocoder):
            raise ConfigError(f"{model} is no model of this package: give others")
        for wanted in (None, *args.look_ahead):
            measured = [first_audio(vocoder, wanted) for _ in range(1 + args.runs)]
            ahead = vocoder.look_ahead() * vocoder.hop_length / vocoder.sample_rate
            ahead = ahead if wanted is None else min(ahead, wanted)
            work = statistics.median(seconds for _, seconds in measured[1:])
            figures = f"{measured[0][0]:.2f}", f"{ahead:.2f}", f"{work:.3f}"
            rows.append((model, path, *figures, f"{difference(vocoder, wanted):.0f}"))
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
