"""How long a stream waits before it can play: seconds of mel, and seconds of work on them.

python benchmarks/first_audio.py frameglow-cc0 --precision float32 bfloat16
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


@torch.inference_mode()
def first_audio(vocoder: Vocoder) -> tuple[float, float]:
    """Seconds of mel that a stream reads before its first audio, and of the clock until then."""
    piece = lab.speech(vocoder.mel_config, PIECE_SECONDS, str(vocoder.device))[0]
    n_frames = 0

    def endless() -> Iterator[Tensor]:
        nonlocal n_frames
        while True:
            n_frames += piece.shape[1]
            yield piece

    begin = time.perf_counter()
    next(vocoder.stream(endless())).cpu()
    seconds = time.perf_counter() - begin
    return n_frames * vocoder.hop_length / vocoder.sample_rate, seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the mel that must be there, the part of it that is look-ahead, and the work."""
    args = lab.parser(__doc__, "precision", "runs", "device").parse_args(argv)
    rows = [("model", "path", "mel s", "look-ahead s", "work s")]
    with lab.folders(args.models) as found:
        systems = lab.load_all(found, args.precision, device=args.device)
    for (model, path), vocoder in systems.items():
        if not isinstance(vocoder, Vocoder):
            raise ConfigError(f"{model} is no model of this package: give others")
        measured = [first_audio(vocoder) for _ in range(1 + args.runs)]
        ahead = vocoder.look_ahead() * vocoder.hop_length / vocoder.sample_rate
        work = statistics.median(seconds for _, seconds in measured[1:])
        rows.append((model, path, f"{measured[0][0]:.2f}", f"{ahead:.2f}", f"{work:.3f}"))
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
