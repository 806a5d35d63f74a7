"""A tiny model, data and recipe that the tests of training share."""

from pathlib import Path

import numpy as np
import torch
from conftest import make_voice
from torch import Tensor

from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.data.cache import (
    AUDIO_FILE,
    F0_FILE,
    MANIFEST_FILE,
    CachedClip,
    F0Settings,
    Manifest,
    TrainingCache,
    file_sha256,
)
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import FlowConfig, build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.objective import Batch, Share
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.loop import Trainer

RATE, HOP = 8000, 64
MEL = MelConfig(
    sample_rate=RATE, n_fft=256, hop_length=HOP, win_length=256, n_mels=20, f_max=4000.0
)
MODEL = FrameGlowConfig(
    n_levels=1,
    n_flows=2,
    hidden_channels=8,
    dilations=(1,),
    encoder_channels=8,
    encoder_layers=1,
)
WAVEGLOW = WaveGlowConfig(
    n_mels=20,
    hop_length=HOP,
    n_flows=3,
    n_early_every=2,
    n_layers=2,
    hidden_channels=8,
    upsample_kernel=2 * HOP,
)
WITH_NOISE_SHARE = MODEL.model_copy(update={"noise_share": True})
MODELS = {"frameglow": MODEL, "waveglow": WAVEGLOW}
# Likelihood alone, from the first step on.
PLAIN: dict[str, object] = {"pitch_steps": 0, "energy_weight": 0.0, "calibration_weight": 0.0}


def recipe(**train: object) -> Recipe:
    """Two pitch steps, then all three objectives, on segments as short as they may be."""
    settings: dict[str, object] = {
        "steps": 6,
        "batch_size": 2,
        "segment_frames": 32,
        "energy_weight": 1.0,
        "calibration_weight": 1.0,
        "pitch_steps": 2,
        "warmup_steps": 2,
        "validate_every": 3,
        "checkpoint_every": 2,
    }
    return Recipe(model=MODEL, mel=MEL, train=TrainConfig(**(settings | train)))


def write_cache(folder: Path, splits: list[str], amplitude: int | None = None) -> TrainingCache:
    """A cache as `prepare` writes it, of voices whose F0 is known and not tracked.

    Clips begin unvoiced, each for another time. With an `amplitude` they are noise of so many
    16-bit steps instead of voices, 0 is digital silence.
    """
    folder.mkdir(parents=True)
    voices = [make_voice(0.6, i, RATE) for i in range(len(splits))]
    frames = [len(voice) // HOP for voice in voices]
    time_ = (np.arange(max(frames)) + 0.5) * HOP / RATE
    f0 = [(120 + 30 * i + 20 * np.sin(4 * np.pi * time_))[:n] for i, n in enumerate(frames)]
    for i, values in enumerate(f0):
        values[: 10 + 25 * (i % 3)] = 0
    if amplitude is not None:
        rng = np.random.default_rng(0)
        voices = [rng.integers(-amplitude, amplitude + 1, len(v)) / 32768 for v in voices]
        f0 = [np.zeros(n) for n in frames]
    samples = [np.round(voice * 32768).clip(-32768, 32767).astype(np.int16) for voice in voices]
    np.save(folder / AUDIO_FILE, np.concatenate(samples))
    np.save(folder / F0_FILE, np.concatenate(f0).astype(np.float32))
    clips = [
        CachedClip(
            id=f"clip{i}",
            corpus="made-up",
            split=split,
            sample_offset=sum(map(len, samples[:i])),
            samples=len(samples[i]),
            frame_offset=sum(frames[:i]),
            frames=frames[i],
        )
        for i, split in enumerate(splits)
    ]
    manifest = Manifest(
        sample_rate=RATE,
        hop_length=HOP,
        f0=F0Settings(),
        sha256={name: file_sha256(folder / name) for name in (AUDIO_FILE, F0_FILE)},
        clips=tuple(clips),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return TrainingCache(folder)


def perturbed(model: FlowConfig = MODEL, seed: int = 0) -> Flow:
    """A flow whose weights are all random: couplings start as the identity, and test nothing."""
    torch.manual_seed(seed)
    flow = build_flow(model, MEL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


def speech(n_frames: int = 40, n_items: int = 2) -> tuple[Tensor, Tensor]:
    """Audio (B, T) and its mel (B, M, F)."""
    voices = [torch.from_numpy(make_voice(1.0, i, RATE)) for i in range(n_items)]
    audio = torch.stack([voice[: n_frames * HOP] for voice in voices])
    return audio, MelSpectrogram(MEL)(audio)


def batch_of(audio: Tensor, mel: Tensor) -> Batch:
    """A whole step of these items, without F0."""
    return Batch(audio, mel, mel.new_zeros(len(mel), mel.shape[2]), Share(0, len(mel), len(mel)))


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments."""
    result = {f"raw.{k}": v for k, v in trainer.flow.state_dict().items()}
    result |= {f"average.{k}": v for k, v in trainer.average.items()}
    for name, parameter in trainer.flow.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            result[f"{key}.{name}"] = value
    return result


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
