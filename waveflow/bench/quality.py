"""What a path costs in quality: copies of recordings by a trained model, path beside path."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from waveflow.audio.io import read_audio
from waveflow.audio.mel import MelSpectrogram
from waveflow.bench.benchmark import Contender
from waveflow.bench.figures import Quality
from waveflow.bench.subjects import FlowSystem
from waveflow.data.corpus import read_corpus
from waveflow.engine.vocoder import VocoderWarning
from waveflow.errors import ConfigError, DataError
from waveflow.metrics.quality import FloatArray, pesq_wb
from waveflow.metrics.spectral import log_mel_l1

# So much of so many recordings; validation clips before others.
N_CLIPS = 8
CLIP_SECONDS = 4.0


def read_clips(folder: Path, sample_rate: int) -> list[FloatArray]:
    """Starts of recordings, (T,) each, from a corpus in LJSpeech's layout or a folder of audio.

    Raises:
        DataError: there is no audio.
        AudioError: a file that cannot be read.
    """
    clips = sorted(read_corpus(folder).clips, key=lambda clip: clip.split != "val")
    n_samples = round(CLIP_SECONDS * sample_rate)
    return [read_audio(clip.path, sample_rate)[0][:n_samples] for clip in clips[:N_CLIPS]]


@torch.inference_mode()
def measure_quality(contender: Contender, clips: Sequence[FloatArray]) -> Quality:
    """Log-mel distance and PESQ of copies to their recordings, means over clips.

    Args:
        contender: a path of a trained model.
        clips: (T,) each, at the model's rate.

    Raises:
        ConfigError: PESQ is not installed.
        DataError: PESQ finds no speech in any clip.
    """
    try:
        from pesq import PesqError
    except ImportError as error:
        raise ConfigError(
            "quality is measured by PESQ: pip install 'waveflow[eval]', or leave --data"
        ) from error
    assert isinstance(contender.system, FlowSystem)
    vocoder, config = contender.system.vocoder, contender.subject.mel_config
    spectrogram = MelSpectrogram(config)
    distances, scores = [], []
    for clip in clips:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VocoderWarning)
            copy = vocoder.resynth(clip).cpu().numpy()
        distances.append(log_mel_l1(clip, copy, spectrogram))
        # It cannot judge a clip in which it finds no speech.
        try:
            scores.append(pesq_wb(clip, copy, config.sample_rate))
        except PesqError:
            continue
    if not scores:
        raise DataError("PESQ found no speech in the recordings: give others as --data")
    return Quality(
        model=contender.subject.name,
        path=contender.path.label,
        precision=contender.path.precision,
        n_clips=len(clips),
        seconds=sum(map(len, clips)) / config.sample_rate,
        log_mel_l1=float(np.mean(distances)),
        pesq=float(np.mean(scores)),
    )
