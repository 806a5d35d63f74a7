"""Mel front end and STFT: parity with the public implementations, framing, gradients, warnings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from waveflow.audio.dequantise import STEP_16_BIT, dequantise
from waveflow.audio.filters import mel_center_hz, mel_filterbank
from waveflow.audio.mel import MEL_PRESETS, MelConfig, MelSpectrogram
from waveflow.audio.stft import hann_window, istft, stft

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "mel.npz")
CLIPS = ("LJ001_0002", "LJ001_0008")
LIBROSA = json.loads(str(FIXTURE["librosa_configs_json"]))


def clip(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(FIXTURE[f"{name}_audio_int16"] / 32768.0).to(dtype)


def librosa_config(keywords: dict) -> MelConfig:
    return MelConfig(
        sample_rate=keywords["sr"],
        n_fft=keywords["n_fft"],
        hop_length=keywords["hop_length"],
        win_length=keywords["win_length"],
        n_mels=keywords["n_mels"],
        f_min=keywords["fmin"],
        f_max=keywords["fmax"],
        padding="center" if keywords["center"] else "hop",
        pad_mode=keywords["pad_mode"],
        mel_scale="htk" if keywords["htk"] else "slaney",
        norm=keywords["norm"],
        power=int(keywords["power"]),
    )


# Tolerances of the log mels: rounding in quiet bins, amplified by the logarithm; four times what
# the references differ by from a float64 computation.
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize(
    ("preset", "stored", "log_atol"), [("nvidia", "tacotron", 1e-3), ("hifigan", "hifigan", 2e-3)]
)
def test_presets_match_the_public_implementations(name, preset, stored, log_atol):
    mel = MelSpectrogram(MEL_PRESETS[preset])(clip(name)).numpy()
    reference = FIXTURE[f"{name}_{stored}_mel"]
    np.testing.assert_allclose(mel, reference, rtol=0, atol=log_atol)
    np.testing.assert_allclose(np.exp(mel), np.exp(reference), rtol=0, atol=1e-5)


def test_hifigan_up_to_nyquist_and_at_another_gain():
    config = MEL_PRESETS["hifigan"].model_copy(update={"f_max": None})
    audio = clip("LJ001_0002")
    mel = MelSpectrogram(config)(audio).numpy()
    np.testing.assert_allclose(mel, FIXTURE["LJ001_0002_hifigan_mel_fmax_none"], rtol=0, atol=2e-3)
    louder = audio / audio.abs().max() * 0.95
    mel = MelSpectrogram(MEL_PRESETS["hifigan"])(louder).numpy()
    np.testing.assert_allclose(mel, FIXTURE["LJ001_0002_hifigan_mel_norm095"], rtol=0, atol=2e-3)


@pytest.mark.parametrize(("preset", "stored"), [("nvidia", "tacotron"), ("hifigan", "hifigan")])
def test_silence(preset, stored):
    mel = MelSpectrogram(MEL_PRESETS[preset])(torch.zeros(2560)).numpy()
    np.testing.assert_allclose(mel, FIXTURE[f"silence_{stored}_mel"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", range(len(LIBROSA)))
def test_librosa_spectrograms(index):
    keywords = LIBROSA[index]
    config = librosa_config(keywords)
    samples = FIXTURE[f"librosa_audio_{keywords['sr']}_int16"] / 32768.0
    reference = FIXTURE[f"librosa_{index}_mel"]
    for dtype in (torch.float64, torch.float32):
        audio = torch.from_numpy(samples).to(dtype)
        if keywords["center"]:
            mel = MelSpectrogram(config).linear(audio)
            expected = reference
        else:
            # Unpadded frame k starts at k * hop; ours, of audio from sample 128 on, at
            # 128 + f * hop - (n_fft - hop) / 2 = (f - 1) * hop. The edges' frames are left out.
            assert (config.n_fft - config.hop_length) // 2 - 128 == config.hop_length
            mel = MelSpectrogram(config).linear(audio[128:])[:, 2:-2]
            expected = reference[:, 1 : 1 + mel.shape[1]]
        assert mel.dtype == dtype
        # The stored values are float32: 5e-7 of each; float32 sums are good to their largest term.
        atol = 1e-5 * expected.max() if dtype == torch.float32 else 0
        np.testing.assert_allclose(mel, expected, rtol=1e-5 if atol == 0 else 0, atol=atol)


def test_filterbanks():
    np.testing.assert_allclose(
        mel_filterbank(MEL_PRESETS["nvidia"]), FIXTURE["tacotron_mel_basis"], rtol=0, atol=1e-7
    )
    for index, keywords in enumerate(LIBROSA):
        np.testing.assert_allclose(
            mel_filterbank(librosa_config(keywords)),
            FIXTURE[f"librosa_{index}_mel_basis"],
            rtol=0,
            atol=1e-7,
        )


@pytest.mark.slow  # importing librosa takes most of a minute; its values are stored for the above
@pytest.mark.parametrize("mel_scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels", "f_min", "f_max"),
    [(8000, 256, 20, 0, None), (22050, 1024, 80, 40, 11025), (48000, 4096, 229, 27.5, 16000)],
)
def test_filterbank_against_librosa(mel_scale, norm, rate, n_fft, n_mels, f_min, f_max):
    config = MelConfig(
        sample_rate=rate,
        n_fft=n_fft,
        win_length=n_fft,
        hop_length=n_fft // 4,
        n_mels=n_mels,
        f_min=f_min,
        f_max=f_max,
        mel_scale=mel_scale,
        norm=norm,
    )
    htk = mel_scale == "htk"
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(
        sr=rate,
        n_fft=n_fft,
        n_mels=n_mels,
        fmin=f_min,
        fmax=f_max,
        htk=htk,
        norm=norm,
        dtype=np.float64,
    )
    np.testing.assert_allclose(mel_filterbank(config), expected, rtol=0, atol=1e-12)
    centers = librosa.mel_frequencies(n_mels + 2, fmin=f_min, fmax=config.f_max_hz, htk=htk)[1:-1]
    np.testing.assert_allclose(mel_center_hz(config), centers, rtol=1e-12)


@pytest.mark.parametrize("preset", ["nvidia", "hifigan"])
@pytest.mark.parametrize("n_samples", [1, 100, 255, 256, 384, 385, 512, 513, 1000, 2560])
def test_every_length_gives_its_frames(preset, n_samples):
    config = MEL_PRESETS[preset]
    audio = torch.randn(2, n_samples, generator=torch.Generator().manual_seed(0))
    mel = MelSpectrogram(config)(audio)
    expected = 1 + n_samples // 256 if preset == "nvidia" else max(1, n_samples // 256)
    assert mel.shape == (2, 80, expected)
    assert config.n_frames(n_samples) == expected
    assert torch.isfinite(mel).all()
    torch.testing.assert_close(MelSpectrogram(config)(audio[1]), mel[1])


@pytest.mark.parametrize(
    "config",
    [
        MEL_PRESETS["nvidia"],
        MEL_PRESETS["hifigan"],
        MelConfig(sample_rate=22050, n_fft=1024, win_length=400, hop_length=200, padding="hop"),
        MelConfig(sample_rate=22050, n_fft=1024, win_length=400, hop_length=160, padding="center"),
        MelConfig(sample_rate=22050, n_fft=2048, win_length=1200, hop_length=300, padding="center"),
    ],
)
def test_margin_frames_is_exact(config):
    generator = torch.Generator().manual_seed(1)
    hop, margin = config.hop_length, config.margin_frames
    audio = torch.randn(60 * hop, generator=generator, dtype=torch.float64)
    spectrogram = MelSpectrogram(config)
    first, n_hops = 20, 20
    whole = spectrogram(audio)[:, first : first + config.n_frames(n_hops * hop)]
    cut = spectrogram(audio[first * hop : (first + n_hops) * hop])
    differs = ((whole - cut).abs() > 1e-9).any(dim=0).nonzero()[:, 0]
    inside = cut.shape[1] - margin
    assert ((differs < margin) | (differs >= inside)).all()
    assert margin == 0 or {margin - 1, inside} & set(differs.tolist())


def test_half_precision_and_autocast_compute_in_float32():
    audio = clip("LJ001_0002")[:8192]
    spectrogram = MelSpectrogram(MEL_PRESETS["hifigan"])
    assert spectrogram(audio.half()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(spectrogram(audio), spectrogram(audio.clone()))
        under_autocast = spectrogram(audio)
    torch.testing.assert_close(under_autocast, spectrogram(audio), rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["nvidia", "hifigan"])
@pytest.mark.parametrize("power", [1, 2])
def test_gradient(preset, power):
    config = MEL_PRESETS[preset].model_copy(update={"power": power})
    # A cache filled in inference mode must not spoil a later training.
    with torch.inference_mode():
        MelSpectrogram(config)(torch.zeros(1024))
    audio = torch.zeros(2, 4096)
    audio[1] = clip("LJ001_0002")[8000:12096]
    audio.requires_grad_()
    MelSpectrogram(config).linear(audio).sum().backward()
    assert torch.isfinite(audio.grad).all()
    audio.grad = None
    MelSpectrogram(config)(audio).sum().backward()
    assert torch.isfinite(audio.grad).all()
    assert (audio.grad[0] == 0).all()
    assert audio.grad[1].abs().max() > 0


def test_gradient_is_right():
    config = MelConfig(
        sample_rate=8000, n_fft=64, win_length=64, hop_length=16, n_mels=8, f_max=None
    )
    generator = torch.Generator().manual_seed(2)
    audio = torch.randn(1, 80, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(MelSpectrogram(config), (audio,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"f_max": 12000}, "half the sample rate"),
        ({"f_min": 8000}, "not below f_max"),
        ({"win_length": 2048}, "longer than n_fft"),
        ({"hop_length": 0}, "greater than 0"),
        ({"win_length": 200}, "longer than win_length"),
        ({"n_fft": 1025}, "odd"),
        ({"hop_length": 255}, "both even or both odd"),
        ({"n_mel": 80}, "Extra inputs"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        MelConfig(**{"sample_rate": 22050, **fields})


def test_config_survives_json():
    for config in MEL_PRESETS.values():
        assert MelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("padding", ["center", "hop"])
@pytest.mark.parametrize(
    ("n_fft", "hop", "win"), [(1024, 256, 1024), (2048, 300, 1200), (512, 160, 400), (64, 32, 64)]
)
def test_inverse_stft_restores_the_audio(padding, n_fft, hop, win):
    generator = torch.Generator().manual_seed(3)
    audio = torch.randn(2, 20 * hop, dtype=torch.float64, generator=generator)
    window = hann_window(win, n_fft, audio.dtype, audio.device)
    spectrum = stft(audio, n_fft, hop, window, padding)
    assert spectrum.shape == (2, 20 + (padding == "center"), n_fft // 2 + 1)
    restored = istft(spectrum, n_fft, hop, window, padding)
    assert restored.shape == audio.shape
    # At the very ends of "hop" framing the window may fade to 0.
    inside = slice(hop, -hop) if padding == "hop" else slice(None)
    torch.testing.assert_close(restored[:, inside], audio[:, inside], rtol=0, atol=1e-10)


def test_stft_equals_torch_and_takes_a_length():
    audio = clip("LJ001_0002")[None, :10000]
    window = hann_window(1024, 1024, audio.dtype, audio.device)
    ours = stft(audio, 1024, 256, window)
    theirs = torch.stft(audio, 1024, 256, 1024, window, pad_mode="reflect", return_complex=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    restored = istft(ours, 1024, 256, window, length=10000)
    torch.testing.assert_close(restored, audio, rtol=0, atol=1e-6)


def test_dequantise():
    audio = torch.zeros(100_000)
    noisy = dequantise(audio, 5)
    torch.testing.assert_close(noisy, dequantise(audio, 5), rtol=0, atol=0)
    assert not torch.equal(noisy, dequantise(audio, torch.Generator().manual_seed(6)))
    assert noisy.abs().max() <= STEP_16_BIT / 2
    # Uniform noise has standard deviation step / sqrt(12); five standard errors of 100,000 draws.
    assert noisy.mean().abs() < 5 * STEP_16_BIT / np.sqrt(12 * 100_000)
    assert noisy.std().item() == pytest.approx(STEP_16_BIT / np.sqrt(12), rel=0.01)
