"""Mel refinement: it converges, keeps phase, and treats padded items as if alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from waveflow.audio.mel import MEL_PRESETS, MelConfig, MelSpectrogram
from waveflow.audio.refine import MelRefinement
from waveflow.audio.stft import hann_window, istft
from waveflow.errors import AudioError, MelMismatchError

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "mel.npz")


def speech(config: MelConfig, n_frames: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    samples = FIXTURE["LJ001_0008_audio_int16"] / 32768.0
    n_frames = min(n_frames, len(samples) // config.hop_length)
    samples = samples[: n_frames * config.hop_length]
    audio = torch.from_numpy(samples).float()[None]
    return audio, MelSpectrogram(config)(audio)[..., :n_frames]


def distance(config: MelConfig, audio: torch.Tensor, mel: torch.Tensor) -> float:
    return float((MelSpectrogram(config)(audio)[..., : mel.shape[2]] - mel).abs().mean())


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["nvidia", "hifigan"])
def test_converges_from_white_noise(preset):
    config = MEL_PRESETS[preset]
    audio, mel = speech(config)
    start = noise(audio.shape)
    assert distance(config, start, mel) > 2
    refined = MelRefinement(config)(start, mel, steps=32)
    assert distance(config, refined, mel) < 0.12


def test_converges_for_power_spectra():
    config = MEL_PRESETS["hifigan"].model_copy(update={"power": 2, "norm": None})
    audio, mel = speech(config)
    refined = MelRefinement(config)(noise(audio.shape), mel, steps=32)
    # The log of a power is twice that of a magnitude.
    assert distance(config, refined, mel) < 0.24


@pytest.mark.parametrize("preset", ["nvidia", "hifigan"])
def test_few_strong_steps_improve_a_good_start(preset):
    config = MEL_PRESETS[preset]
    audio, mel = speech(config)
    spectrum = MelSpectrogram(config).spectrum(audio)
    generator = torch.Generator().manual_seed(1)
    gain = torch.exp(0.2 * torch.randn(spectrum.shape, generator=generator))
    turn = 0.5 * torch.randn(spectrum.shape, generator=generator)
    window = hann_window(1024, 1024, torch.float32, audio.device)
    spectrum = spectrum * torch.polar(gain, turn)
    start = istft(spectrum, 1024, 256, window, config.padding, audio.shape[1])
    refine = MelRefinement(config, power=1.5, momentum=0.5)
    distances = [distance(config, refine(start, mel, steps), mel) for steps in (0, 1, 4)]
    assert distances[1] < 0.75 * distances[0]
    assert distances[2] < 0.5 * distances[0]


@pytest.mark.parametrize("preset", ["nvidia", "hifigan"])
def test_a_matching_waveform_stays(preset):
    config = MEL_PRESETS[preset]
    audio, mel = speech(config)
    refined = MelRefinement(config, power=1.5, momentum=0.5)(audio, mel, steps=4)
    # Rounding alone: the mel is fitted to 1e-3 in its quietest bins.
    torch.testing.assert_close(refined, audio, rtol=0, atol=1e-5)


def test_no_steps_is_the_identity():
    config = MEL_PRESETS["hifigan"]
    audio = noise((2, 2560))
    assert torch.equal(MelRefinement(config)(audio, torch.zeros(2, 80, 10), steps=0), audio)


def test_bins_outside_every_band_are_kept():
    config = MEL_PRESETS["hifigan"]
    time = torch.arange(40 * 256, dtype=torch.float64) / config.sample_rate
    tone = 0.1 * torch.sin(2 * torch.pi * 10_000 * time)[None]
    refined = MelRefinement(config)(tone, torch.full((1, 80, 40), -11.5), steps=2)
    # 2 kHz above the highest band. The reflected ends are broad-band clicks: they may change, and
    # two steps carry that two frames of 1024 samples inwards.
    inside = slice(2048 + 512, -2048 - 512)
    torch.testing.assert_close(refined[:, inside], tone[:, inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize("preset", ["nvidia", "hifigan"])
def test_padded_items_get_what_they_get_alone(preset, pad_mode):
    config = MEL_PRESETS[preset].model_copy(update={"pad_mode": pad_mode})
    refine = MelRefinement(config, power=1.5, momentum=0.5)
    lengths = torch.tensor([60, 1, 2, 3, 37])
    audio, mel = speech(config, 60)
    # Rubbish beyond an item's end must not be seen.
    batch_mel = mel + noise((5, 80, 60), 2)
    start = audio + noise((5, 60 * 256), 3)
    together = refine(start, batch_mel, 4, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = refine(start[i : i + 1, : n * 256], batch_mel[i : i + 1, :, :n], 4)
        torch.testing.assert_close(together[i : i + 1, : n * 256], alone, rtol=0, atol=1e-5)
        assert (together[i, n * 256 :] == 0).all()


@pytest.mark.parametrize(
    "config",
    [
        MelConfig(sample_rate=22050, n_fft=1024, win_length=400, hop_length=200, padding="center"),
        MelConfig(sample_rate=22050, n_fft=1024, win_length=1024, hop_length=300, padding="hop"),
        MelConfig(sample_rate=22050, n_fft=512, win_length=400, hop_length=160, padding="hop"),
    ],
)
def test_other_framings(config):
    audio, mel = speech(config)
    refined = MelRefinement(config)(noise(audio.shape), mel, steps=16)
    assert distance(config, refined, mel) < 0.5
    assert refined.abs().max() < 2


@pytest.mark.parametrize("start_level", [0.0, 1e-8, 1.0])
def test_nothing_overflows(start_level):
    config = MEL_PRESETS["nvidia"]
    start = start_level * noise((1, 40 * 256))
    mel = torch.full((1, 80, 40), -11.5)
    mel[..., 20:] = 3.0
    refined = MelRefinement(config, power=1.5, momentum=0.5)(start, mel, steps=64)
    assert torch.isfinite(refined).all()


def test_wrong_sizes_are_named():
    refine = MelRefinement(MEL_PRESETS["hifigan"])
    with pytest.raises(AudioError, match=r"2560 samples does not fit a mel of 11 frames.*2816"):
        refine(torch.zeros(1, 2560), torch.zeros(1, 80, 11), steps=1)
    with pytest.raises(MelMismatchError, match=r"100 bands.*80"):
        refine(torch.zeros(1, 2560), torch.zeros(1, 100, 10), steps=1)
