"""Quality that lower precision costs: copies of recordings by a trained model, path by path.

    python benchmarks/quality.py frameglow-cc0 --data RECORDINGS --precision float32 int8

RECORDINGS is a corpus in LJSpeech's layout or a folder of audio. Needs the extra `eval`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pesq import PesqError

import lab
from waveflow.audio.io import read_audio
from waveflow.cli.console import show_table
from waveflow.data.corpus import read_corpus
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError, DataError
from waveflow.metrics.quality import FloatArray, pesq_wb
from waveflow.metrics.spectral import log_mel_l1

# So much of so many recordings, validation clips before others.
N_CLIPS, CLIP_SECONDS = 8, 4.0


@torch.inference_mode()
def measure(vocoder: Vocoder, clips: Sequence[FloatArray]) -> tuple[float, float]:
    """Mean log-mel distance and mean PESQ of the copies of clips (T,) to their recordings."""
    distances, scores = [], []
    for clip in clips:
        copy = vocoder.resynth(clip).cpu().numpy()
        distances.append(log_mel_l1(clip, copy, vocoder.mel_spectrogram))
        try:
            scores.append(pesq_wb(clip, copy, vocoder.sample_rate))
        except PesqError:
            continue  # PESQ found no speech in this clip
    if not scores:
        raise DataError("PESQ found no speech in the recordings: give others as --data")
    return float(np.mean(distances)), float(np.mean(scores))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints log-mel L1 and PESQ-WB of every path."""
    parser = lab.parser(__doc__, "precision")
    parser.add_argument("--data", type=Path, required=True, help="the recordings")
    args = parser.parse_args(argv)
    found = sorted(read_corpus(args.data).clips, key=lambda clip: clip.split != "val")[:N_CLIPS]
    rows = [("model", "path", "clips", "seconds", "log-mel L1", "PESQ-WB")]
    systems = lab.load_all({name: name for name in args.models}, args.precision)
    for (model, path), vocoder in systems.items():
        if not isinstance(vocoder, Vocoder):
            raise ConfigError(f"{model} is no model of this package: give others")
        rate = vocoder.sample_rate
        clips = [read_audio(clip.path, rate)[0][: round(CLIP_SECONDS * rate)] for clip in found]
        seconds = sum(map(len, clips)) / rate
        distance, pesq = measure(vocoder, clips)
        figures = (f"{seconds:.0f}", f"{distance:.4f}", f"{pesq:.3f}")
        rows.append((model, path, str(len(clips)), *figures))
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
