"""The denoiser: parity with NVIDIA's, what it does to any audio, and `waveflow denoise`.

Tolerances of the parity tests are those of the fixtures: about twenty times (audio) and nine
times (spectra, up to 71) the reference's own float32 rounding.
"""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, make_voice
from test_waveglow import _read as read_published
from torch import Tensor

from waveflow.audio import denoise
from waveflow.audio.denoise import Denoiser, n_fft_at
from waveflow.audio.io import resample
from waveflow.audio.mel import MelConfig
from waveflow.cli.denoise import Bias
from waveflow.cli.main import main
from waveflow.engine.vocoder import load
from waveflow.errors import AudioError, ConfigError

FIXTURES = Path(__file__).parent / "fixtures"
CASES = ("small_zeros", "small_normal", "80mel_zeros")


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    with np.load(FIXTURES / "denoiser.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def mel_config(n_mels: int) -> MelConfig:
    return MelConfig(sample_rate=SAMPLE_RATE, n_mels=n_mels, padding="center")


def voice(seconds: float = 0.5, seed: int = 0) -> Tensor:
    return torch.from_numpy(make_voice(seconds, seed))


def white(n_samples: int, level: float = 0.01, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return level * torch.randn(n_samples, generator=generator)


def level_db(audio: Tensor) -> float:
    return 10 * torch.log10(audio.square().mean()).item()


# Parity


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "strength"), [("001", 0.01), ("01", 0.1)])
def test_subtraction_is_the_published_one(
    stored: dict[str, Tensor], case: str, name: str, strength: float
) -> None:
    denoiser = Denoiser(stored[f"{case}_bias_spec"].flatten())
    expected = stored[f"{case}_denoised_strength_{name}"][:, 0]
    denoised = denoiser(stored["input_audio"], strength)
    # The published code loses what follows the last whole hop.
    assert denoised.shape == (2, 6000) and expected.shape == (2, 5888)
    torch.testing.assert_close(denoised[:, :5888], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bias_is_the_published_one(stored: dict[str, Tensor], case: str) -> None:
    size, _, bias = case.partition("_")
    published = read_published(f"nvidia-waveglow-{size}")
    flow = published.flow()
    asked: list[Tensor] = []

    def synthesise(mel: Tensor) -> Tensor:
        asked.append(mel)
        # The stored draw of the normal mode came from another generator.
        mel = stored["small_normal_mel_input"] if bias == "normal" else mel
        with torch.no_grad():
            return flow.decode(torch.zeros(1, 8, mel.shape[2] * 32), mel)

    config = mel_config(published.config.n_mels)
    denoiser = Denoiser.of_model(synthesise, config, bias)  # type: ignore[arg-type]
    expected = stored[f"{case}_bias_spec"].flatten()
    torch.testing.assert_close(denoiser.bias, expected, rtol=0, atol=5e-4)
    assert asked[0].shape == (1, config.n_mels, 88)
    if bias == "zeros":
        assert not asked[0].any()
        head = stored[f"{case}_bias_audio_head"]
        torch.testing.assert_close(synthesise(asked[0])[:, :2048], head, rtol=0, atol=3e-5)
    else:
        # 352 values: their mean and deviation are within five standard errors of 0 and 1.
        assert abs(asked[0].mean()) < 0.27 and abs(asked[0].std() - 1) < 0.19


# The bias


def test_silence_is_asked_for_as_the_model_hears_it() -> None:
    """A vocoder that follows its mel and hums: only silence shows the hum alone."""
    config = MelConfig(sample_rate=SAMPLE_RATE, n_fft=512, hop_length=128, win_length=512)
    n_samples = 88 * 128
    hum = 0.01 * torch.sin(torch.arange(n_samples) * (2 * torch.pi * 8 / 512))

    def synthesise(mel: Tensor) -> Tensor:
        loudness = mel.exp().mean(1).repeat_interleave(128, 1)[:, :n_samples]
        return hum + loudness * white(n_samples)

    silent = Denoiser.of_model(synthesise, config, "silence")
    assert silent.n_fft == 512
    # A sine of amplitude a in bin 8 of a Hann window: a / 2 times the window's sum, n_fft / 2.
    # The answer to silence, log(1e-5), adds noise of 1e-7 and rounding.
    assert silent.bias[8] == pytest.approx(0.01 / 4 * 512, rel=1e-4)
    assert silent.bias[20:].max() < 1e-4
    loud = Denoiser.of_model(synthesise, config, "zeros")
    assert loud.bias[20:].mean() > 0.05


def test_bias_of_a_noise_is_its_mean_magnitude() -> None:
    """White noise of deviation s: s sqrt(sum of w^2) sqrt(pi) / 2 in each bin (Rayleigh)."""
    noise = white(600_000).reshape(2, -1)
    denoiser = Denoiser.of_noise(noise, 1024)
    expected = 0.01 * (1024 * 3 / 8) ** 0.5 * torch.pi**0.5 / 2
    # 2300 frames that overlap count like about 1100: the mean is within 0.52 / sqrt(1100) = 1.6 %,
    # and the greatest of 510 bins within five times that. The outermost are real, not complex.
    inner = denoiser.bias[2:-2]
    assert (inner / expected - 1).abs().max() < 0.08
    assert inner.mean() == pytest.approx(expected, rel=0.005)


def test_a_noise_of_one_window_and_no_less() -> None:
    assert Denoiser.of_noise(white(1024), 1024).n_fft == 1024
    with pytest.raises(AudioError, match="1023 samples are too short for a noise: give 1024"):
        Denoiser.of_noise(white(1023), 1024)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(1, 513, 1), r"not \(1, 513, 1\)"),
        (torch.ones(2), r"not \(2,\)"),
        (-torch.ones(513), "negative"),
        (torch.full((513,), torch.nan), "NaN"),
        (torch.full((513,), torch.inf), "infinite"),
    ],
)
def test_a_wrong_bias_is_refused(bias: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Denoiser(bias)


@pytest.mark.parametrize(
    ("sample_rate", "n_fft"),
    [(8000, 512), (16000, 1024), (22050, 1024), (24000, 1024), (44100, 2048), (48000, 2048)],
)
def test_windows_last_about_as_long_at_every_rate(sample_rate: int, n_fft: int) -> None:
    assert n_fft_at(sample_rate) == n_fft


# The subtraction


def test_a_constant_noise_goes_and_speech_stays() -> None:
    speech = voice(2.0)
    noise = white(len(speech), seed=1)
    denoiser = Denoiser.of_noise(white(SAMPLE_RATE, seed=2), 1024)
    denoised = denoiser(speech + noise, 1.0)
    # Of |S| Rayleigh-distributed, half-wave rectification at the mean leaves 0.107 of the power.
    assert level_db(denoiser(noise, 1.0)) < level_db(noise) - 9.0
    assert level_db(denoised - speech) < level_db(noise) - 3.0


@pytest.mark.parametrize("n_samples", [1, 2, 255, 511, 512, 513, 1024, 6000])
def test_length_is_kept_and_nothing_is_lost_at_strength_0(n_samples: int) -> None:
    audio = voice()[:n_samples].double()
    denoised = Denoiser(torch.ones(513))(audio, 0.0)
    torch.testing.assert_close(denoised, audio, rtol=0, atol=1e-12)


def test_a_bias_above_everything_leaves_silence() -> None:
    audio = torch.stack([voice(), torch.zeros(len(voice()))])
    assert torch.equal(Denoiser(torch.full((513,), 1e4))(audio, 1.0), torch.zeros_like(audio))


def test_items_of_a_batch_do_not_touch() -> None:
    denoiser = Denoiser(torch.full((513,), 0.5))
    audio = torch.stack([voice(seed=0), voice(seed=1)])
    both = denoiser(audio, 0.5)
    for item, expected in zip(audio, both, strict=True):
        torch.testing.assert_close(denoiser(item, 0.5), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_fft", [8, 10, 64])
def test_long_audio_in_blocks_equals_the_whole(n_fft: int) -> None:
    denoiser = Denoiser(torch.full((n_fft // 2 + 1,), 0.05, dtype=torch.float64))
    size = 1024 * (n_fft // 4)
    for n_samples in (size, size + 1, 2 * size - 1, 3 * size + 5):
        audio = white(n_samples, level=0.1).double()
        whole = denoiser._subtract(audio[None], denoiser.bias)[0]
        assert (whole - audio).abs().max() > 0.01
        torch.testing.assert_close(denoiser(audio, 1.0), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    denoiser = Denoiser(torch.full((513,), 0.2))
    audio = voice().to(dtype)
    denoised = denoiser(audio, 0.5)
    assert denoised.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = denoiser(audio.float(), 0.5)
    torch.testing.assert_close(denoised.float(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 10.1, float("nan"), float("inf")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ConfigError, match="give a number from 0 to 10"):
        Denoiser(torch.ones(513))(voice(), strength)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(0), "not empty"),
        (torch.zeros(1, 1, 100), r"not \(1, 1, 100\)"),
        (torch.full((100,), torch.nan), "NaN"),
        (torch.zeros(100, dtype=torch.int64), "int64 does not tell its range"),
        (torch.full((100,), 9000.0), "peak of 9000"),
        (torch.zeros(100, 2), "samples, channels"),
    ],
)
def test_wrong_audio_is_refused(audio: Tensor, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        Denoiser(torch.ones(513))(audio, 0.1)
    with pytest.raises(AudioError, match=message):
        Denoiser.of_noise(audio, 1024)


# The command line


def write(path: Path, audio: Tensor, rate: int = SAMPLE_RATE) -> Path:
    soundfile.write(path, audio.numpy(), rate, "FLOAT")
    return path


def read(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def run(*args: str | Path) -> int:
    return main(["denoise", *map(str, args)])


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    return write(tmp_path / "in.wav", voice() + white(len(voice()), seed=1))


@pytest.fixture
def pause(tmp_path: Path) -> Path:
    return write(tmp_path / "pause.wav", white(8000))


def test_denoise_with_a_recorded_noise(tmp_path: Path, spoken: Path, pause: Path) -> None:
    out = tmp_path / "out.wav"
    assert run(spoken, "-o", out, "--noise", pause, "--float") == 0
    expected = Denoiser.of_noise(read(pause), 1024)(read(spoken), 1.0)
    torch.testing.assert_close(read(out), expected, rtol=0, atol=1e-6)
    assert run(spoken, "-o", out, "--noise", pause, "--float", "--strength", "0.3") == 0
    expected = Denoiser.of_noise(read(pause), 1024)(read(spoken), 0.3)
    torch.testing.assert_close(read(out), expected, rtol=0, atol=1e-6)


def test_recordings_keep_their_rates(tmp_path: Path, pause: Path) -> None:
    """The noise follows the rate of each recording of a folder."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for rate in (16000, 44100):
        write(folder / f"{rate}.wav", white(rate, seed=1), rate)
    assert run(folder, "-o", out, "--noise", pause) == 0
    for rate in (16000, 44100):
        audio, own_rate = soundfile.read(out / f"{rate}.wav", dtype="float32")
        noise = torch.from_numpy(resample(read(pause).numpy(), SAMPLE_RATE, rate))
        denoiser = Denoiser.of_noise(noise, n_fft_at(rate))
        expected = denoiser(read(folder / f"{rate}.wav"), 1.0)
        assert own_rate == rate
        # Written as 16-bit integers.
        torch.testing.assert_close(torch.from_numpy(audio), expected, rtol=0, atol=2.0**-15)


@pytest.mark.parametrize("bias", [None, *Bias])
def test_denoise_with_a_model(
    tmp_path: Path, spoken: Path, tiny_model: Path, bias: Bias | None
) -> None:
    out = tmp_path / "out.wav"
    options = [] if bias is None else ["--bias", bias]
    assert run(spoken, "-o", out, "--model", tiny_model, "--float", *options) == 0
    vocoder = load(tiny_model)
    denoiser = Denoiser.of_model(
        lambda mel: vocoder.draw(mel, sigma=0.0), vocoder.mel_config, (bias or Bias.silence).value
    )
    expected = denoiser(read(spoken), 0.1)
    torch.testing.assert_close(read(out), expected, rtol=0, atol=1e-6)


def test_nothing_removed_is_said(
    tmp_path: Path, spoken: Path, pause: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.wav"
    assert run(spoken, "-o", out, "--noise", pause, "--strength", "0") == 0
    assert "nothing to hear was removed" in capsys.readouterr().err
    assert run(spoken, "-o", out, "--noise", pause) == 0
    assert capsys.readouterr().err == f"waveflow: {out}, 0.5 s\n"


def test_short_noise_is_named_before_anything_is_written(
    tmp_path: Path, spoken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.wav"
    short = write(tmp_path / "short.wav", white(1000))
    assert run(spoken, "-o", out, "--noise", short) == 2
    assert capsys.readouterr().err == (
        f"waveflow: {short}: 1000 samples are too short for a noise: give 1024 or more\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("others", [("--model", "x"), ("--bias", "zeros")])
def test_a_noise_and_a_model_exclude_each_other(
    tmp_path: Path,
    spoken: Path,
    pause: Path,
    others: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(spoken, "-o", tmp_path / "out.wav", "--noise", pause, *others) == 2
    assert "drop --model and --bias" in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["-1", "11", "nan"])
def test_strength_on_the_command_line(
    tmp_path: Path, spoken: Path, pause: Path, strength: str
) -> None:
    out = tmp_path / "out.wav"
    assert run(spoken, "-o", out, "--noise", pause, f"--strength={strength}") == 2
    assert not out.exists()


def test_values_of_bias_are_those_of_the_library() -> None:
    assert tuple(Bias) == get_args(denoise.Bias)
