"""What several test files share: a tiny model, a voice, a corpus, figures of the published code."""

import hashlib
import math
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

if TYPE_CHECKING:
    from torch import Tensor

    from waveflow.flow import Flow

SAMPLE_RATE = 22050
N_MELS = 80

# A shell starts its background jobs with Ctrl-C ignored, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_voice(seconds: float, seed: int = 0, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Something with pitch, pauses and noise, (T,) float32: harmonics under a slow envelope."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    f0 = 120 + 30 * seed + 20 * np.sin(2 * np.pi * 2 * time)
    phase = 2 * np.pi * np.cumsum(f0) / sample_rate
    voiced = sum(np.sin(k * phase) / k for k in range(1, 20))
    envelope = np.clip(np.sin(2 * np.pi * 1.5 * time + 0.3), 0, None)
    noise = rng.standard_normal(len(time))
    return (0.15 * voiced * envelope + 0.002 * noise).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a FrameGlow with random weights, too small to be of use."""
    import torch

    from waveflow.audio.mel import MEL_PRESETS
    from waveflow.checkpoint import ModelConfig, Provenance, SynthesisConfig, save_checkpoint
    from waveflow.models.frameglow import FrameGlowConfig
    from waveflow.models.registry import build_flow

    config = ModelConfig(
        model=FrameGlowConfig(
            n_flows=1, hidden_channels=16, dilations=(1,), encoder_channels=16, encoder_layers=1
        ),
        mel=MEL_PRESETS["hifigan"],
        synthesis=SynthesisConfig(refine_steps=2),
        provenance=Provenance(
            data="a made-up voice",
            licence="CC0-1.0",
            steps=3,
            log_likelihood=1.25,
            mel_range=((-11.5,) * N_MELS, (2.0,) * N_MELS),
        ),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = build_flow(config.model, config.mel)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, config, flow.state_dict())
    return folder


@pytest.fixture(scope="session")
def tiny_voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a voice with random weights."""
    from small_voice import TINY, tiny_model_of

    from waveflow.audio.mel import MEL_PRESETS
    from waveflow.tts.voice import VoiceCard, save_voice

    folder = tmp_path_factory.mktemp("voices") / "tiny"
    save_voice(folder, VoiceCard(model=TINY, mel=MEL_PRESETS["hifigan"]), tiny_model_of(N_MELS))
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips in LJSpeech's layout, the last of them for validation."""
    corpus = tmp_path_factory.mktemp("corpora") / "tiny"
    (corpus / "wavs").mkdir(parents=True)
    ids = [f"clip{i}" for i in range(4)]
    for seed, clip in enumerate(ids):
        voice = make_voice(0.7, seed)
        soundfile.write(corpus / "wavs" / f"{clip}.wav", voice, SAMPLE_RATE, "PCM_16")
    (corpus / "metadata.csv").write_text("".join(f"{clip}|words|words\n" for clip in ids))
    (corpus / "val.txt").write_text(f"{ids[-1]}\n")
    return corpus


def upsample_weight(arrays: Mapping[str, np.ndarray]) -> "Tensor":
    """The (80, 80, 1024) weight that the 80-band fixture keeps as integer factors."""
    import torch

    a, b = (arrays[f"upsample_factor_{k}"].astype(np.int64) for k in "ab")
    integers = np.einsum("rio,rk->iok", a, b, optimize=True)
    weight = np.ascontiguousarray(integers.astype("<f4") / np.float32(8192))
    digest = hashlib.sha256(weight.tobytes()).hexdigest()
    assert digest == str(arrays["upsample_weight_sha256"])
    return torch.from_numpy(weight)


def latent(reference: "Mapping[str, Tensor]") -> "Tensor":
    """The published code injects the noise that left last first: z holds it in reverse."""
    import torch

    noises = sorted(name for name in reference if name.removeprefix("noise_").isdecimal())
    return torch.cat([reference[name] for name in reversed(noises)], 1)


def encode_with_terms(
    flow: "Flow", audio: "Tensor", mel: "Tensor"
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """z of a WaveGlow, then the sums over positions (n_flows, B) of log_s and of log|det W|."""
    import torch

    from waveflow.bijections import Coupling, InvertibleConv1x1

    log_s: list[torch.Tensor] = []
    log_det_w: list[torch.Tensor] = []
    handles = []
    for kind, terms in ((Coupling, log_s), (InvertibleConv1x1, log_det_w)):
        for module in flow.bijection.modules():
            if isinstance(module, kind):
                handles.append(
                    module.register_forward_hook(
                        lambda _module, _inputs, output, terms=terms: terms.append(output[1])
                    )
                )
    with torch.no_grad():
        z = flow.encode(audio, mel)
    for handle in handles:
        handle.remove()
    return z, torch.stack(log_s), torch.stack(log_det_w)


def published_loss(flow: "Flow", audio: "Tensor", mel: "Tensor", sigma: float) -> "Tensor":
    """NLL - log(sqrt(2 pi)) at sigma 1; other sigmas weigh the z term by 1 / sigma^2."""
    import torch

    with torch.no_grad():
        nll = -flow(audio, mel).mean()
        half_square = 0.5 * flow.encode(audio, mel).square().mean()
    return nll - 0.5 * math.log(2 * math.pi) + half_square * (1 / sigma**2 - 1)


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The kernel takes this many bytes of a file and refuses the rest, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
