"""Adapters, called as their hosts call them. `test_hosts.py` has the hosts themselves."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from waveflow.adapters.base import Adapter
from waveflow.adapters.coqui import CoquiVocoder, coqui_audio
from waveflow.adapters.espnet import ESPnetVocoder
from waveflow.adapters.hifigan import HiFiGANVocoder
from waveflow.adapters.nemo import NeMoVocoder
from waveflow.adapters.nvidia import WaveGlowVocoder
from waveflow.adapters.speechbrain import SpeechBrainVocoder
from waveflow.adapters.torchaudio import TorchaudioVocoder, with_vocoder
from waveflow.adapters.transformers import TransformersVocoder
from waveflow.adapters.vocos import VocosVocoder
from waveflow.engine.vocoder import Vocoder, load
from waveflow.errors import ConfigError, MelMismatchError

N, HOP = 20, 256
# How each host calls, and what it makes of the result: (N,) or (B, N).
CALLS: dict[type[Adapter], Callable[..., Tensor]] = {
    HiFiGANVocoder: lambda v, mel: v(mel)[:, 0],
    WaveGlowVocoder: lambda v, mel: v.infer(mel, sigma=0.4),
    VocosVocoder: lambda v, mel: v.decode(mel),
    TransformersVocoder: lambda v, mel: v(mel.transpose(1, 2)),
    TorchaudioVocoder: lambda v, mel: v(mel, None)[0],
    CoquiVocoder: lambda v, mel: torch.cat([v.inference(item[None])[0] for item in mel]),
    ESPnetVocoder: lambda v, mel: torch.stack([v(item.T) for item in mel]),
    NeMoVocoder: lambda v, mel: v.convert_spectrogram_to_audio(spec=mel),
    SpeechBrainVocoder: lambda v, mel: v.decode_batch(mel)[:, 0],
}
every_adapter = pytest.mark.parametrize("adapter", CALLS, ids=lambda a: a.__name__)


@pytest.fixture(scope="module")
def vocoder(tiny_model: Path) -> Vocoder:
    return load(tiny_model)


@pytest.fixture(scope="module")
def mels(vocoder: Vocoder) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return -6 + torch.rand(2, 80, N, generator=generator)


@every_adapter
def test_a_host_gets_the_vocoders_audio(
    vocoder: Vocoder, mels: Tensor, adapter: type[Adapter]
) -> None:
    adapted = adapter(vocoder, sigma=0.4)
    asked = mels.clone().requires_grad_()
    audio = CALLS[adapter](adapted, asked)
    assert audio.shape == (2, N * HOP) and not audio.requires_grad
    assert audio.dtype == torch.float32 and audio.abs().max() <= 1
    alone = torch.stack([vocoder(mel, sigma=0.4) for mel in mels])
    torch.testing.assert_close(audio, alone, rtol=0, atol=1e-5)
    assert torch.equal(CALLS[adapter](adapted, mels), audio)  # deterministic, as hosts expect


@every_adapter
def test_a_host_may_treat_it_as_any_module(
    vocoder: Vocoder, mels: Tensor, adapter: type[Adapter]
) -> None:
    adapted = adapter(vocoder, sigma=0.4)
    before = CALLS[adapter](adapted, mels)
    host = nn.Module()
    host.vocoder = adapted
    host.train()
    host.half()
    host.to(torch.float64).to("cpu")
    adapted.remove_weight_norm()
    assert not adapted.training and not vocoder.flow.training
    parameter = next(adapted.parameters())
    assert parameter.dtype == torch.float32 and parameter.device.type == "cpu"
    assert torch.equal(
        CALLS[adapter](adapted, mels.half().float()), CALLS[adapter](adapted, mels.half())
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CALLS[adapter](adapted, mels), before)
    assert adapted.sample_rate == 22050


@every_adapter
def test_options_of_an_adapter(vocoder: Vocoder, mels: Tensor, adapter: type[Adapter]) -> None:
    if adapter is not WaveGlowVocoder:
        other = CALLS[adapter](adapter(vocoder, seed=5, sigma=0.4), mels)
        expected = vocoder(mels, seed=5, sigma=0.4)
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="sigma 20 is out of range"):
        adapter(vocoder, sigma=20)
    log10 = adapter(vocoder, convention="log10", sigma=0.4)
    audio = CALLS[adapter](log10, mels / torch.log(torch.tensor(10.0)))
    torch.testing.assert_close(audio, vocoder(mels, sigma=0.4), rtol=0, atol=1e-4)


def test_a_model_by_name(tiny_model: Path) -> None:
    assert HiFiGANVocoder(tiny_model).vocoder.folder == tiny_model
    assert TransformersVocoder(str(tiny_model)).config.sampling_rate == 22050


def test_a_foreign_mel_is_an_error_in_the_host(vocoder: Vocoder) -> None:
    with pytest.raises(MelMismatchError, match="convention"):
        HiFiGANVocoder(vocoder)(torch.rand(1, 80, 100) * 40 - 60)


def test_padded_batches_of_transformers(vocoder: Vocoder, mels: Tensor) -> None:
    """Zeros at the end, which natural logarithms would make a roar, become silence."""
    padded = mels.transpose(1, 2).clone()
    padded[1, 12:] = 0.0
    with pytest.warns(UserWarning, match="8 of 40 frames"):
        audio = TransformersVocoder(vocoder, sigma=0.0)(padded)
    silent = mels.clone()
    silent[1, :, 12:] = -11.5129
    torch.testing.assert_close(audio, vocoder(silent, sigma=0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths(vocoder: Vocoder, mels: Tensor, dtype: torch.dtype) -> None:
    lengths = torch.tensor([N, 12], dtype=dtype)
    audio, n_samples = TorchaudioVocoder(vocoder)(mels, lengths)
    assert n_samples.dtype == dtype and n_samples.tolist() == [N * HOP, 12 * HOP]
    assert not audio[1, 12 * HOP :].any()
    alone = vocoder(mels[1, :, :12])
    torch.testing.assert_close(audio[1, : 12 * HOP], alone, rtol=0, atol=1e-5)
    assert torch.equal(SpeechBrainVocoder(vocoder).decode_batch(mels, lengths)[:, 0], audio)


def test_single_mels(vocoder: Vocoder, mels: Tensor) -> None:
    alone = vocoder(mels[0])
    assert torch.equal(HiFiGANVocoder(vocoder)(mels[0]), alone[None, None])
    assert torch.equal(SpeechBrainVocoder(vocoder).decode_spectrogram(mels[0]), alone[None])
    assert torch.equal(TransformersVocoder(vocoder)(mels[0].T), alone)


def test_nvidias_denoiser_finds_what_it_reads(vocoder: Vocoder) -> None:
    waveglow = WaveGlowVocoder(vocoder)
    mel = waveglow.upsample.weight.new_zeros((1, 80, 88))
    assert waveglow.infer(mel, sigma=0.0).shape == (1, 88 * HOP)
    assert waveglow.remove_weightnorm(waveglow) is waveglow


def test_nemos_denoiser(vocoder: Vocoder, mels: Tensor) -> None:
    nemo = NeMoVocoder(vocoder)
    denoised = nemo.convert_spectrogram_to_audio(
        spec=mels, sigma=0.4, denoise=True, denoiser_strength=0.1
    )
    expected = vocoder.denoise(vocoder(mels, sigma=0.4), 0.1)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-5)


def test_a_bundle_of_torchaudio(vocoder: Vocoder) -> None:
    bundle = SimpleNamespace(sample_rate=22050, get_vocoder=lambda: None)
    ours = TorchaudioVocoder(vocoder)
    changed = with_vocoder(bundle, ours)
    assert changed.get_vocoder() is ours and changed.get_vocoder(dl_kwargs={}) is ours
    assert bundle.get_vocoder() is None and changed.sample_rate == 22050


def test_coquis_settings(vocoder: Vocoder) -> None:
    settings = coqui_audio(vocoder.mel_config)
    assert (settings["mel_fmax"], settings["signal_norm"]) == (8000.0, False)


def test_an_adapter_is_copied_with_its_model(vocoder: Vocoder, mels: Tensor) -> None:
    adapted = HiFiGANVocoder(vocoder)
    twin = copy.deepcopy(adapted)
    assert twin.flow is twin.vocoder.flow and twin.flow is not adapted.flow
    assert torch.equal(twin(mels), adapted(mels))
