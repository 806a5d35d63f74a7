"""Mel conventions: presets against plain formulas, conversion, recognition, the folder of mels."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_voice
from test_cli import Run, assert_one_line, run, samples  # noqa: F401  (run is a fixture)
from torch import Tensor

import waveflow
from waveflow.audio.conventions import find_convention, foreign_words, readings_of
from waveflow.audio.conversion import MelConversion
from waveflow.audio.mel import MEL_PRESETS, MelConfig, MelSpectrogram
from waveflow.audio.mel_names import SCALES, convention_named
from waveflow.checkpoint import ModelConfig
from waveflow.engine.doctor import diagnose, turned
from waveflow.engine.streaming import delayed
from waveflow.engine.vocoder import Vocoder, load
from waveflow.errors import ConfigError, MelMismatchError
from waveflow.pretrained import model_folder
from waveflow.training.config import Recipe

OWN = MEL_PRESETS["hifigan"]
EXAMPLE = model_folder(None) / "example.npy"
FIXTURE = np.load(Path(__file__).parent / "fixtures" / "mel.npz")


class Row(NamedTuple):
    """A row of the table of systems: numbers written from their sources, not from ours."""

    rate: int
    n_fft: int
    hop: int
    win: int
    low: float
    high: float
    bands: int
    bank: str
    pad: int
    zeros: bool
    tolerance: float


TABLE = {
    "nvidia": Row(22050, 1024, 256, 1024, 0, 8000, 80, "slaney", 512, False, 5e-6),
    "hifigan": Row(22050, 1024, 256, 1024, 0, 8000, 80, "slaney", 384, False, 5e-6),
    "bigvgan-22k": Row(22050, 1024, 256, 1024, 0, 11025, 80, "slaney", 384, False, 5e-6),
    "bigvgan-24k": Row(24000, 1024, 256, 1024, 0, 12000, 100, "slaney", 384, False, 5e-6),
    "bigvgan-44k": Row(44100, 2048, 512, 2048, 0, 22050, 128, "slaney", 768, False, 5e-6),
    "vocos": Row(24000, 1024, 256, 1024, 0, 12000, 100, "htk", 512, False, 1e-5),
    "nemo-fastpitch": Row(22050, 1024, 256, 1024, 0, 8000, 80, "slaney", 512, True, 1e-6),
    "nemo-hifigan": Row(22050, 1024, 256, 1024, 0, 8000, 80, "slaney", 384, True, 1e-6),
    "coqui": Row(22050, 1024, 256, 1024, 0, 11025, 80, "slaney", 512, False, 2e-6),
    "coqui-log": Row(22050, 1024, 256, 1024, 0, 8000, 80, "slaney", 512, False, 2e-5),
    "torchaudio-griffinlim": Row(22050, 1024, 256, 1024, 0, 8000, 80, "slaney", 512, False, 6e-6),
    "torchaudio-wavernn": Row(22050, 2048, 275, 1100, 40, 11025, 80, "slaney", 1024, False, 5e-6),
    "espnet": Row(22050, 1024, 256, 1024, 80, 7600, 80, "slaney", 512, False, 1e-6),
    "parallel-wavegan": Row(22050, 1024, 256, 1024, 80, 7600, 80, "slaney", 512, False, 4e-7),
    "speecht5": Row(16000, 1024, 256, 1024, 80, 7600, 80, "slaney", 512, False, 2e-6),
    "fastspeech2conformer": Row(22050, 1024, 256, 1024, 80, 7600, 80, "slaney", 512, False, 1e-6),
}


def values(name: str, magnitude: Tensor, bank: Tensor) -> Tensor:
    """The last steps of each system, from |STFT| (bins, F)."""

    def log10(mel: Tensor, least: float) -> Tensor:
        return mel.clamp_min(least).log10()

    match name:
        case "hifigan" | "bigvgan-22k" | "bigvgan-24k" | "bigvgan-44k":
            return (bank @ (magnitude.square() + 1e-9).sqrt()).clamp_min(1e-5).log()
        case "vocos":
            return (bank @ magnitude).clamp_min(1e-7).log()
        case "nemo-fastpitch":
            return (bank @ magnitude + 1e-5).log()
        case "coqui":
            decibels = 20 * log10(bank @ magnitude, 1e-8) - 20
            return (8 * (decibels + 100) / 100 - 4).clamp(-4, 4)
        case "coqui-log":
            return (bank @ magnitude).clamp_min(1e-8).log()
        case "torchaudio-wavernn":
            natural = (bank @ magnitude).clamp_min(1e-5).log()
            return ((-100 - 20 * log10(natural.exp(), 1e-5)) / -100).clamp(0, 1)
        case "espnet" | "fastspeech2conformer":
            return log10(bank @ magnitude.square().clamp_min(1e-10).sqrt(), 1e-10)
        case "parallel-wavegan" | "speecht5":
            return log10(bank @ magnitude, 1e-10)
    return (bank @ magnitude).clamp_min(1e-5).log()


def librosa_bank(row: Row) -> Tensor:
    """librosa's mel filters by its published formulas; `tests/test_mel.py` has librosa's own."""

    def to_mel(hz: float) -> float:
        if row.bank == "htk":
            return 2595 * math.log10(1 + hz / 700)
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / (math.log(6.4) / 27)

    def to_hz(mel: float) -> float:
        if row.bank == "htk":
            return 700 * (10 ** (mel / 2595) - 1)
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    mels = np.linspace(to_mel(row.low), to_mel(row.high), row.bands + 2)
    edges = np.array([to_hz(mel) for mel in mels])
    bins = np.arange(row.n_fft // 2 + 1) * row.rate / row.n_fft
    bank = np.zeros((row.bands, len(bins)))
    for i, (left, middle, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        up, down = (bins - left) / (middle - left), (right - bins) / (right - middle)
        bank[i] = np.maximum(0, np.minimum(up, down))
        if row.bank == "slaney":
            bank[i] *= 2 / (right - left)
    return torch.from_numpy(bank)


@pytest.mark.parametrize("name", TABLE)
def test_presets_equal_plain_formulas(name: str) -> None:
    row = TABLE[name]
    audio = torch.from_numpy(FIXTURE["LJ001_0002_audio_int16"] / 32768.0)[:16000]
    audio[5000:9000] = 0  # where floors are all there is
    mode = "constant" if row.zeros else "reflect"
    padded = torch.nn.functional.pad(audio[None], (row.pad, row.pad), mode=mode)[0]
    window = torch.hann_window(row.win, periodic=not row.zeros, dtype=torch.float64)
    spectrum = torch.stft(
        padded, row.n_fft, row.hop, row.win, window, center=False, return_complex=True
    )
    expected = values(name, spectrum.abs(), librosa_bank(row))
    mel = MelSpectrogram(MEL_PRESETS[name])(audio)
    assert mel.shape == expected.shape
    torch.testing.assert_close(mel, expected, rtol=0, atol=row.tolerance)


def converted(source: MelConfig, target: MelConfig, mel: Tensor, lossy: bool = False) -> Tensor:
    return torch.from_numpy(MelConversion(source, target, lossy)(mel.numpy()))


def test_every_preset_is_in_the_table() -> None:
    assert MEL_PRESETS.keys() == TABLE.keys()


def test_preemphasis_and_bands_of_their_own_mean_and_deviation() -> None:
    audio = torch.from_numpy(make_voice(0.2)).double()
    emphasised = torch.cat([audio[:1], audio[1:] - 0.97 * audio[:-1]])
    config = OWN.model_copy(update={"preemphasis": 0.97})
    torch.testing.assert_close(MelSpectrogram(config)(audio), MelSpectrogram(OWN)(emphasised))
    mel = MelSpectrogram(OWN)(audio)
    mean, std = mel.mean(1), mel.std(1)
    scaled = OWN.model_copy(
        update={"scale": tuple((1 / std).tolist()), "offset": tuple((-mean / std).tolist())}
    )
    expected = (mel - mean[:, None]) / std[:, None]
    torch.testing.assert_close(MelSpectrogram(scaled)(audio), expected)
    torch.testing.assert_close(converted(scaled, OWN, expected), mel)


# --- configs that are written ---


def test_old_checkpoints_keep_their_bytes() -> None:
    """Also what a run compares and hashes is this text."""
    written = json.loads((model_folder(None) / "config.json").read_text())["mel"]
    config = ModelConfig.model_validate_json((model_folder(None) / "config.json").read_bytes())
    assert config.mel == OWN
    assert json.dumps(config.mel.model_dump()) == json.dumps(written)
    assert json.loads(config.model_dump_json())["mel"] == written


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = MEL_PRESETS[name]
    assert MelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", ["coqui", "speecht5"])
def test_models_take_natural_logarithms(name: str) -> None:
    with pytest.raises(ValueError, match=r"mel\.log is .*--convention"):
        Recipe.model_validate({"model": {"type": "frameglow"}, "mel": name})
    for trained in ("vocos", "nemo-fastpitch"):
        assert not MEL_PRESETS[trained].model_problem


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.0}, "scale is 0"),
        ({"offset": (1.0, 2.0)}, "offset has 2 values for 80 mel bands"),
        ({"clip": (1.0, 1.0)}, "clip 1 is not below 1"),
        ({"log": "3"}, "'e', '2', '10', 'db' or 'none'"),
    ],
)
def test_settings_that_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MelConfig(sample_rate=22050, **fields)


# --- conversion ---

EXACT = ["log10", "log2", "db", "linear", "no-norm", "int16", "int16,log10", "no-norm,db"]


@pytest.fixture(scope="module")
def example() -> Tensor:
    return torch.from_numpy(np.load(EXAMPLE))


@pytest.mark.parametrize("name", [*EXACT, "coqui-log", "nemo-fastpitch"])
def test_what_is_lossless_comes_back(example: Tensor, name: str) -> None:
    config = convention_named(name, OWN)
    there = converted(OWN, config, example.double())
    back = converted(config, OWN, there)
    torch.testing.assert_close(back, example.double().clamp_min(math.log(1e-5)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*EXACT, "coqui-log", "nemo-hifigan"])
def test_conversion_equals_the_mel_computed_there(name: str) -> None:
    audio = torch.from_numpy(make_voice(0.4)).double()
    quiet = {"magnitude_floor": 0.0, "padding": "hop", "pad_mode": "constant"}
    config = convention_named(name, OWN).model_copy(update=quiet)
    own = OWN.model_copy(update=quiet)
    mel = converted(config, own, MelSpectrogram(config)(audio))
    tolerance = 0.04 if config.window == "symmetric" else 1e-6
    expected = MelSpectrogram(own)(audio)
    torch.testing.assert_close(mel, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coqui", "f_max 11025, not 8000"),
        ("vocos", "sample_rate 24000, not 22050"),
        ("torchaudio-wavernn", "hop_length 275, not 256"),
        ("espnet", "f_min 80, not 0"),
        ("power", "power 2, not 1"),
    ],
)
def test_what_is_lossy_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(MelMismatchError, match=f"{words}.*--lossy"):
        MelConversion(convention_named(name, OWN), OWN)


# Log-mel L1 to the mel computed with our settings, of this clip; docs/development.md has more.
LOSSY_COST = {"bigvgan-22k": 0.13, "vocos": 0.15, "espnet": 0.17, "power": 0.12, "emphasis": 0.15}


@pytest.mark.parametrize("name", LOSSY_COST)
def test_the_cost_of_a_lossy_conversion(name: str) -> None:
    emphasised = OWN.model_copy(update={"preemphasis": 0.97})
    config = emphasised if name == "emphasis" else convention_named(name, OWN)
    audio = FIXTURE["LJ001_0002_audio_int16"] / 32768.0
    at_rate = audio
    if config.sample_rate != OWN.sample_rate:
        import soxr

        at_rate = soxr.resample(audio, OWN.sample_rate, config.sample_rate)
    own = OWN.model_copy(update={"padding": config.padding})
    mel = converted(config, own, MelSpectrogram(config)(torch.from_numpy(at_rate)), lossy=True)
    expected = MelSpectrogram(own)(torch.from_numpy(audio))
    n_frames = min(mel.shape[1], expected.shape[1])
    assert abs(mel.shape[1] - expected.shape[1]) <= 1
    error = (mel - expected)[:, :n_frames].abs().mean().item()
    assert error < LOSSY_COST[name]


@pytest.mark.parametrize("delay", [0, 3, -3, 10, -10])
@pytest.mark.parametrize("cuts", [[6], [1, 1, 4], [2, 0, 4]])
def test_audio_is_delayed_across_pieces(delay: int, cuts: list[int]) -> None:
    audio = torch.arange(1.0, 7.0)
    moved = torch.cat(list(delayed(iter(audio.split(cuts)), lambda: delay)))
    expected = torch.zeros(6)
    for i in range(6):
        if 0 <= i - delay < 6:
            expected[i] = audio[i - delay]
    assert torch.equal(moved, expected)


# --- recognition ---


def as_scales(mel: np.ndarray, name: str) -> np.ndarray:
    """A natural mel in another scale, as the systems that use it compute it."""
    linear = np.exp(mel)
    decibels = 20 * np.log10(np.maximum(linear, 1e-5))
    match name:
        case "ln":
            return mel
        case "log10":
            return np.log10(np.maximum(linear, 1e-5))
        case "dB":
            return decibels
        case "[-4, 4]":
            return np.clip((decibels - 20 + 100) / 100 * 8 - 4, -4, 4)
        case "[0, 1]":
            return np.clip((decibels - 20 + 100) / 100, 0, 1)
        case "[-1, 1]":
            return np.clip((decibels - 20 + 100) / 100 * 2 - 1, -1, 1)
        case "z-scored":
            return (mel - mel.mean()) / mel.std()
        case "no area norm":
            edges = np.log(as_bands())
            return mel + edges[:, None]
    raise AssertionError(name)


def as_bands() -> np.ndarray:
    """Half the width in Hz of each band: an area norm is 2 / width."""
    row = TABLE["hifigan"]
    plain, normed = (librosa_bank(row._replace(bank=b)) for b in ("plain", "slaney"))
    return (plain.sum(1) / normed.sum(1)).numpy()


NAMED = {
    "ln": "native",
    "log10": "log10",
    "dB": "db",
    "[-4, 4]": "to-4",
    "[0, 1]": "to-01",
    "[-1, 1]": "to-1",
    "no area norm": "no-norm",
}


@pytest.mark.parametrize("gain", [0.3, 1.0])
def test_scales_are_told_apart(gain: float) -> None:
    audio = torch.from_numpy(gain * FIXTURE["LJ001_0008_audio_int16"] / 32768.0)
    told = {
        name: find_convention(MelSpectrogram(config)(audio).numpy(), OWN).name
        for name, config in readings_of(OWN).items()
        # Quiet, the logarithm to base 10 of power is like the natural one of magnitudes.
        if name in (*SCALES, "native", "int16,log10") or (name, gain) == ("power,log10", 1.0)
    }
    assert {name: found for name, found in told.items() if found != name} == {}


def smoothed(mel: np.ndarray) -> np.ndarray:
    """As acoustic models make mels: the mean of five frames."""
    return np.stack([np.convolve(band, np.ones(5) / 5, "valid") for band in mel])


def test_own_mels_are_not_foreign(example: Tensor) -> None:
    """Whole or in pieces, loud or quiet, as smooth as acoustic models make them."""
    mel = example.numpy()
    smooth = smoothed(mel)
    for own in (mel, smooth, np.maximum(mel + math.log(0.3), math.log(1e-5)), mel + math.log(3)):
        assert foreign_words(own, OWN) == ""
        for start in range(0, own.shape[1] - 64, 30):
            for n_frames in (1, 10, 24, 64):
                assert foreign_words(own[:, start : start + n_frames], OWN) == ""


@pytest.mark.parametrize("name", [*NAMED, "z-scored"])
def test_foreign_mels_are_refused_by_name(example: Tensor, name: str) -> None:
    words = foreign_words(as_scales(example.numpy(), name), OWN)
    if name == "ln":
        assert words == ""
    elif name == "z-scored":
        assert "zero mean and unit variance" in words and "FILE.toml" in words
    else:
        assert f"--convention {NAMED[name]}" in words
        assert foreign_words(as_scales(smoothed(example.numpy()), name), OWN) == words


def test_what_is_no_speech_is_not_judged() -> None:
    time = torch.arange(40000) / 22050
    for audio in (
        0.3 * torch.sin(2760 * time),
        0.1 * torch.randn(40000, generator=torch.Generator().manual_seed(0)),
    ):
        assert foreign_words(MelSpectrogram(OWN)(audio).numpy(), OWN) == ""
    # Sizes that no logarithm has are refused all the same.
    assert "--convention" in foreign_words(np.full((80, 3), -60.0) + np.eye(80, 3), OWN)


@pytest.mark.parametrize("padding", [0.0, -100.0, 9.0])
def test_frames_of_one_value_tell_nothing(example: Tensor, padding: float) -> None:
    frames = np.full((80, 200), padding)
    log10 = np.concatenate([example.numpy() / math.log(10), frames], 1)
    assert find_convention(log10, OWN).name == "log10"
    assert foreign_words(np.concatenate([example.numpy(), frames], 1), OWN) == ""
    assert foreign_words(frames, OWN) == ""  # a denoiser asks so for a model's hum


def test_figures_that_a_mel_does_not_tell(example: Tensor) -> None:
    mel = example.numpy()
    zero_to_one = (mel - mel.min()) / np.ptp(mel)
    by_band = (mel - mel.mean(1, keepdims=True)) / mel.std(1, keepdims=True)
    for foreign, words in (
        (zero_to_one, r"\[0, 1\] by its own"),
        (2 * zero_to_one - 1, r"\[-1, 1\] by its own"),
        (as_scales(mel, "z-scored"), "zero mean"),
        (by_band, "zero mean"),
    ):
        with pytest.raises(MelMismatchError, match=f"{words}.*does not tell the figures"):
            find_convention(foreign, OWN)
    with pytest.raises(MelMismatchError, match="23 frames do not tell"):
        find_convention(mel[:, :23], OWN)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("klatt", "no convention 'klatt': give auto, native"),
        ("log10,klatt", "no convention"),
        ("", "no convention"),
    ],
)
def test_names_that_there_are_not(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        waveflow.SynthesisOptions(convention=name)


# --- in the vocoder ---


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    return load()


def test_a_convention_changes_nothing_but_the_numbers(vocoder: Vocoder, example: Tensor) -> None:
    own = vocoder(example[:, :100])
    for name in ("log10", "db", "coqui-log", "no-norm"):
        config = convention_named(name, OWN).model_copy(update={"padding": "hop"})
        mel = converted(OWN, config, example[:, :100])
        given = config if name == "coqui-log" else name
        torch.testing.assert_close(vocoder(mel, convention=given), own, rtol=0, atol=1e-3)
    torch.testing.assert_close(vocoder(example[:, :100].T, time_major=True), own, rtol=0, atol=1e-6)


def test_a_centred_mel_is_spoken_in_its_place(vocoder: Vocoder, example: Tensor) -> None:
    """Half a hop earlier than a mel of whole hops with these values; batches and streams alike."""
    own = vocoder(example[:, :60])
    centred = vocoder(example[:, :60], convention="nvidia")
    assert torch.equal(centred[:-128], own[128:]) and not centred[-128:].any()
    pieces = vocoder.stream(example[:, :60].split(25, 1), convention="nvidia")
    torch.testing.assert_close(torch.cat(list(pieces)), centred, rtol=0, atol=1e-4)
    batch = torch.stack([example[:, :60], example[:, 60:120]])
    audio, n_samples = vocoder(batch, lengths=[40, 60], convention="nvidia")
    assert n_samples.tolist() == [40 * 256, 60 * 256]
    alone = vocoder(example[:, :40], convention="nvidia")
    torch.testing.assert_close(audio[0, : 40 * 256], alone, rtol=0, atol=1e-4)
    # The other way round: a model of centred mels speaks half a hop late.
    mel = OWN.model_copy(update={"padding": "center"})
    other = Vocoder(vocoder.config.model_copy(update={"mel": mel}), vocoder.flow)
    audio, _ = other(batch, lengths=[40, 60], convention="hifigan")
    own, _ = other(batch, lengths=[40, 60])
    assert not audio[:, :128].any() and not audio[0, 40 * 256 :].any()
    assert torch.equal(audio[0, 128 : 40 * 256], own[0, : 40 * 256 - 128])


def test_what_the_vocoder_refuses(vocoder: Vocoder, example: Tensor) -> None:
    with pytest.raises(MelMismatchError, match="80 x 80 does not tell its axes"):
        vocoder(example[:, :80], time_major="auto")
    with pytest.raises(MelMismatchError, match="transpose it, or change --time-major"):
        vocoder(example.T)
    with pytest.raises(MelMismatchError, match="80 bands, its convention has 100"):
        vocoder(example, convention="vocos", lossy=True)
    with pytest.raises(MelMismatchError, match=r"f_max 11025, not 8000.*lossy=True"):
        vocoder(example, convention="coqui")
    with pytest.raises(ConfigError, match="no stream"):
        list(vocoder.stream([example], convention="speecht5", lossy=True))
    with pytest.raises(ConfigError, match="takes no lengths"):
        vocoder(example[None], lengths=[9], convention="speecht5", lossy=True)
    with pytest.raises(ConfigError, match="resynth makes the mel itself"):
        vocoder.resynth(torch.zeros(1000), convention="log10")
    for foreign in (20 / math.log(10) * example, example / math.log(10)):
        with pytest.raises(MelMismatchError, match="--convention"):
            vocoder(foreign)
        with pytest.raises(MelMismatchError, match="--convention"):
            list(vocoder.stream(foreign.split(20, 1)))


def test_a_lossy_mel_is_spoken(vocoder: Vocoder) -> None:
    audio = torch.from_numpy(make_voice(1.0, sample_rate=16000))
    mel = MelSpectrogram(MEL_PRESETS["speecht5"])(audio).T
    speech = vocoder(mel, convention="speecht5", time_major=True, lossy=True)
    assert abs(len(speech) - 22050) < 512


# --- the folder of mels ---

SHAPES = {
    "bands first": lambda mel: mel,
    "a batch of one": lambda mel: mel[None],
    "time first": lambda mel: mel.T,
    "a batch of one, time first": lambda mel: mel.T[None],
}


QUIET = 24


def folder_of_mels(folder: Path, mel: np.ndarray, power: np.ndarray) -> dict[str, str]:
    """39 mels of one clip in common forms; their scales by their names."""
    made = {}

    def write(scale: str, shape: str, dtype: type, suffix: str) -> None:
        natural = power if scale == "ln of power" else as_scales(mel, scale)
        values = np.ascontiguousarray(SHAPES[shape](natural).astype(dtype))
        path = folder / f"{len(made):02}{suffix}"
        if suffix == ".pt":
            torch.save(torch.from_numpy(values), path)
        elif suffix == ".npz":
            np.savez(path, mel=values)
        else:
            np.save(path, values)
        made[path.name] = scale

    for shape in SHAPES:
        for dtype in (np.float16, np.float64):
            for suffix in (".npy", ".npz", ".pt"):
                write("ln", shape, dtype, suffix)
    scales = [*list(NAMED)[1:], "ln of power", "z-scored"]
    for i, scale in enumerate([*scales, *scales][:15]):
        write(scale, list(SHAPES)[i % 4], np.float32, (".npy", ".npz", ".pt")[i % 3])
    return made


def test_the_folder_of_mels_speaks(
    run: Run,  # noqa: F811
    tmp_path: Path,
    vocoder: Vocoder,
    example: Tensor,
) -> None:
    speech = example[:, 80:170]
    mel = torch.cat([speech, torch.full((80, QUIET), math.log(1e-5))], 1)
    power = MelSpectrogram(convention_named("power", OWN))(vocoder(mel)).numpy()
    folder, out = tmp_path / "mels", tmp_path / "wavs"
    folder.mkdir()
    scales = folder_of_mels(folder, mel.numpy(), power)
    assert len(scales) == 39
    options = ("--convention", "auto", "--time-major", "auto", "--threads", "1")
    result = run("vocode", folder, "-o", out, *options)
    lacking = [name for name, scale in scales.items() if scale in ("ln of power", "z-scored")]
    assert result.status == 2
    for name in lacking:
        (line,) = [line for line in result.err.splitlines() if f"{folder / name}: " in line]
        assert ("power 2, not 1" if scales[name] == "ln of power" else "the figures") in line
    spoken = {path.stem for path in out.iterdir()}
    assert spoken == {Path(name).stem for name in scales if name not in lacking}

    def copies(name: str) -> tuple[float, float]:
        """Log-mel L1 to the native mel, and the level of what should be silent."""
        audio = torch.from_numpy(samples(out / f"{Path(name).stem}.wav"))
        error = (vocoder.mel_spectrogram(audio) - mel)[:, : speech.shape[1]].abs().mean().item()
        return error, audio[-(QUIET - 4) * 256 :].square().mean().sqrt().item()

    native, _ = copies("00.npy")
    for name in scales:
        if name not in lacking:
            error, noise = copies(name)
            assert error < native + 0.02, (scales[name], error, native)
            assert noise < 1e-4, (scales[name], noise)
    # Without a convention, nothing that is foreign makes a sound.
    plain = tmp_path / "plain"
    assert run("vocode", folder, "-o", plain, "--threads", "1").status == 2
    first = {name for name, scale in scales.items() if scale == "ln" and int(name[:2]) < 12}
    assert {path.stem for path in plain.iterdir()} == {name[:2] for name in first}


def test_lossy_is_allowed_by_name(
    run: Run,  # noqa: F811
    tmp_path: Path,
    example: Tensor,
) -> None:
    source, out = tmp_path / "mel.npy", tmp_path / "out.wav"
    wide = convention_named("bigvgan-22k", OWN)
    np.save(source, converted(OWN, wide, example[:, :60], lossy=True).numpy())
    named = ("--convention", "bigvgan-22k")
    assert_one_line(run("vocode", source, "-o", out, *named), "f_max 11025, not 8000", "--lossy")
    assert not out.exists()
    assert run("vocode", source, "-o", out, *named, "--lossy").status == 0
    assert len(samples(out)) == 60 * 256


def test_a_copys_own_mel_is_never_judged(
    run: Run,  # noqa: F811
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of whatever the recording is: its mel was made here."""
    monkeypatch.setattr("waveflow.engine.incoming.foreign_words", lambda mel, own: "foreign")
    audio = make_voice(0.5)
    soundfile.write(tmp_path / "in.wav", audio, 22050)
    out = ("-o", tmp_path / "out.wav", "--model", tiny_model)
    assert run("resynth", tmp_path / "in.wav", *out).status == 0
    tiny = load(tiny_model)
    tiny.resynth(audio)
    with pytest.raises(MelMismatchError, match="foreign"):
        tiny(tiny.mel(audio))


# --- convert-mel and doctor ---


def test_convert_mel(run: Run, tmp_path: Path, example: Tensor) -> None:  # noqa: F811
    source, there, back = (tmp_path / f"{name}.npy" for name in ("own", "there", "back"))
    np.save(source, example.numpy())
    to = ("--from", "native", "--to", "nemo-fastpitch")
    result = run("convert-mel", source, "-o", there, *to)
    assert result.status == 0 and "+0.5 hops" in result.err
    np.testing.assert_allclose(np.load(there), (example.exp() + 1e-5).log(), rtol=0, atol=1e-5)
    assert run("convert-mel", there, "-o", back, "--from", "nemo-fastpitch").status == 0
    np.testing.assert_allclose(np.load(back), example, rtol=0, atol=1e-2)
    figures = tmp_path / "figures.toml"
    figures.write_text("scale = 0.5\noffset = 3.0\n")
    scaled = tmp_path / "scaled.npy"
    assert (
        run("convert-mel", source, "-o", scaled, "--from", "hifigan", "--to", figures).status == 0
    )
    np.testing.assert_allclose(np.load(scaled), 0.5 * example + 3, rtol=0, atol=1e-5)
    np.save(there, (example / math.log(10)).T.numpy())
    auto = ("--from", "auto", "--time-major", "auto")
    result = run("convert-mel", there, "-o", back, *auto)
    assert result.status == 0 and "taken for log10" in result.err
    np.testing.assert_allclose(np.load(back), example, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--from", "klatt"), "no convention 'klatt'"),
        (("--from", "hifigan", "--to", "auto"), "--to auto"),
        (("--from", "no.toml"), "cannot read convention no.toml"),
        (("--from", "bad.toml"), "is not TOML"),
        (("--from", "wrong.toml"), "wrong.toml: scales"),
        (("--from", "coqui"), "f_max 11025, not 8000"),
    ],
)
def test_what_convert_mel_refuses(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: Tensor,
    options: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("scale =")
    Path("wrong.toml").write_text("scales = 1")
    np.save("mel.npy", example.numpy())
    assert_one_line(run("convert-mel", "mel.npy", "-o", "out.npy", *options), words)
    assert not Path("out.npy").exists()


def test_doctor_names_bands_that_the_values_leave_open(vocoder: Vocoder, example: Tensor) -> None:
    """The values of these two hardly differ: the model hears in which a voice is right."""
    speech = vocoder(example)
    for name in ("hifigan", "bigvgan-22k"):
        mel = MelSpectrogram(MEL_PRESETS[name])(speech).numpy()
        found = diagnose(vocoder, mel)
        assert name in found[0].names
        other = next(d for d in found if {"hifigan", "bigvgan-22k"} & {*d.names} and d != found[0])
        assert other.behind < 4 and found[0].evidence > other.evidence + 0.3


def test_auto_hears_bands_that_are_not_the_models(vocoder: Vocoder) -> None:
    """Coqui's bands reach 11025 Hz: its values alone would pass for the model's bands."""
    audio = torch.from_numpy(FIXTURE["LJ001_0008_audio_int16"] / 32768.0)
    mel = MelSpectrogram(MEL_PRESETS["coqui"])(audio)
    with pytest.raises(MelMismatchError, match=r"taken for coqui: .*f_max 11025, not 8000"):
        vocoder(mel, convention="auto")
    speech = vocoder.synthesise(mel, waveflow.SynthesisOptions(convention="auto", lossy=True))
    assert speech.notes[0] == "taken for coqui"


def test_doctor(
    run: Run,  # noqa: F811
    tmp_path: Path,
    vocoder: Vocoder,
    example: Tensor,
) -> None:
    np.save(tmp_path / "a.npy", (20 / math.log(10) * example).numpy())
    result = run("doctor", tmp_path / "a.npy")
    assert result.status == 0 and "80 bands, 292 frames" in result.out
    assert result.out.splitlines()[2].startswith("db")
    np.save(tmp_path / "a.npy", (20 / math.log(10) * example[:, :100]).numpy())
    np.save(tmp_path / "b.npy", example[:, :100].T.numpy())
    np.save(tmp_path / "c.npy", np.zeros((7, 40)))
    result = run("doctor", tmp_path)
    assert result.status == 2 and result.err.count("\n") == 1 and "bands of a mel" in result.err
    one, two = result.out.splitlines()
    assert "db" in one and "time-major" in two and "native" in two
    with pytest.raises(MelMismatchError, match="3 frames"):
        diagnose(vocoder, turned(example[:, :3].numpy(), OWN)[0])
