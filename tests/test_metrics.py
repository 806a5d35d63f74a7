import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from waveflow.audio.io import read_audio, resample, write_audio
from waveflow.audio.mel import MEL_PRESETS, MelSpectrogram
from waveflow.audio.refine import MelRefinement
from waveflow.data.corpus import select_ids
from waveflow.engine.options import OWN_OPTIONS, SynthesisOptions
from waveflow.errors import AudioError, DataError
from waveflow.metrics import copies as copies_module
from waveflow.metrics import evaluation as evaluation_module
from waveflow.metrics.copies import evaluate
from waveflow.metrics.evaluation import COLUMNS, METRICS
from waveflow.metrics.griffin_lim import griffin_lim, least_squares_magnitude, smooth_magnitude
from waveflow.metrics.quality import at_rate, dnsmos, pesq_wb, stoi
from waveflow.metrics.spectral import draw_correlation, log_mel_l1, signal_to_noise_db
from waveflow.metrics.voicing import compare_f0, voicing

RATE = 22050
FIXTURE = Path(__file__).parent / "fixtures" / "mel.npz"
CONFIG = MEL_PRESETS["hifigan"]


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """1.9 seconds of LJSpeech in whole hops."""
    with np.load(FIXTURE, allow_pickle=False) as arrays:
        audio = arrays["LJ001_0002_audio_int16"].astype(np.float32) / 32768
    return audio[: len(audio) // 256 * 256]


@pytest.fixture(scope="module")
def noisy(speech: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    return (speech + 0.02 * noise).clip(-1, 1)


def tone(hz: float, seconds: float = 1.0) -> np.ndarray:
    """A pulse-like harmonic tone, which a tracker takes for a voice."""
    time = np.arange(int(RATE * seconds)) / RATE
    harmonics = [np.sin(2 * np.pi * hz * k * time) / k for k in range(1, 20)]
    return (0.2 * sum(harmonics)).astype(np.float32)


# --- single figures ---


def test_pesq_is_highest_for_the_recording_itself_and_falls_with_noise(speech, noisy):
    pytest.importorskip("pesq")
    # 4.64 is the highest value of P.862.2's mapping.
    assert pesq_wb(speech, speech, RATE) == pytest.approx(4.64, abs=0.01)
    assert pesq_wb(speech, noisy, RATE) < 3.0


def test_stoi_is_one_for_the_recording_itself_and_falls_with_noise(speech, noisy):
    pytest.importorskip("pystoi")
    assert stoi(speech, speech, RATE) == pytest.approx(1.0, abs=1e-6)
    assert 0.5 < stoi(speech, noisy, RATE) < 0.995


def test_stoi_of_too_little_speech_is_nan(speech):
    pytest.importorskip("pystoi")
    assert math.isnan(stoi(speech[8000:12000], speech[8000:12000], RATE))


def test_dnsmos_prefers_the_clean_recording(speech, noisy):
    pytest.importorskip("speechmos.dnsmos")
    # It repeats a clip by doubling it until it has 9.01 s: of this length, once and no more.
    clip = slice(0, round(1.14 * RATE))
    assert 2.0 < dnsmos(noisy[clip], RATE) + 0.2 < dnsmos(speech[clip], RATE) < 5.0


def test_the_ripple_of_a_filter_stays_below_full_scale():
    square = np.sign(np.sin(2 * np.pi * 441 * (np.arange(RATE) + 0.5) / RATE)).astype(np.float32)
    assert np.abs(resample(square, RATE, 16000)).max() > 1.1
    assert np.abs(at_rate(square, RATE, 16000)).max() == 1.0


def test_voicing_measures_a_known_shift_of_pitch():
    pytest.importorskip("pyworld")
    same = voicing(tone(150.0), tone(150.0), RATE)
    shifted = voicing(tone(150.0), tone(150.0 * 2 ** (50 / 1200)), RATE)
    assert same == (1.0, 0.0)
    assert shifted.f1 > 0.95
    # Half a quarter tone of tolerance: the tracker's own error at the ends of the tone.
    assert shifted.f0_error_cents == pytest.approx(50.0, abs=5.0)


def test_voicing_f1_counts_both_kinds_of_error():
    reference = np.array([100.0, 100.0, 100.0, 0.0, 0.0])
    copy = np.array([200.0, 0.0, 0.0, 100.0, 0.0])
    # 1 hit, 2 misses, 1 false alarm: 2 / (2 + 2 + 1); the hit is an octave off.
    assert compare_f0(reference, copy) == pytest.approx((0.4, 1200.0))


def test_voicing_of_silence_is_nan_not_perfect():
    assert all(math.isnan(value) for value in compare_f0(np.zeros(5), np.zeros(5)))


def test_log_mel_l1_of_a_doubled_waveform_is_log_two(speech):
    # Below 1 in 10^3 the magnitude floor and log floor of silent bands hold the two together.
    assert log_mel_l1(speech / 2, speech, MelSpectrogram(CONFIG)) == pytest.approx(
        math.log(2), abs=0.02
    )


def test_signal_to_noise():
    signal = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert signal_to_noise_db(signal, signal) == float("inf")
    assert signal_to_noise_db(signal, 0.9 * signal) == pytest.approx(20, abs=1e-4)
    assert signal_to_noise_db(signal, torch.zeros_like(signal)) == pytest.approx(0, abs=1e-9)


def test_draw_correlation_ignores_offset_and_scale():
    first, second = np.random.default_rng(0).standard_normal((2, 10_000))
    assert draw_correlation(first, 3 * first + 1) == pytest.approx(1.0)
    assert draw_correlation(first, -first) == pytest.approx(-1.0)
    # Standard error 0.01.
    assert abs(draw_correlation(first, second)) < 0.05
    assert math.isnan(draw_correlation(first, np.zeros(10_000)))


# --- Griffin-Lim ---


@pytest.mark.parametrize("inversion", [least_squares_magnitude, smooth_magnitude])
@pytest.mark.parametrize("preset", ["hifigan", "nvidia"])
def test_inverted_magnitudes_have_the_mel(speech, inversion, preset):
    config = MEL_PRESETS[preset]
    spectrogram = MelSpectrogram(config)
    mel = spectrogram(torch.from_numpy(speech))
    magnitude = inversion(mel, config)
    assert magnitude.shape == (mel.shape[1], config.n_fft // 2 + 1)
    assert (magnitude >= 0).all()
    again = spectrogram.of_spectrum(torch.complex(magnitude, torch.zeros_like(magnitude))[None])
    error = (again[0].T.clamp_min(config.log_floor).log() - mel).abs().mean()
    # A copy by Griffin-Lim is 0.08 to 0.11 off, so what the inversion adds must be far below that.
    assert error < 0.03


def test_smooth_magnitude_inverts_a_power_mel(speech):
    config = CONFIG.model_copy(update={"power": 2, "log_floor": 1e-10})
    spectrogram = MelSpectrogram(config)
    mel = spectrogram(torch.from_numpy(speech))
    magnitude = smooth_magnitude(mel, config)
    again = spectrogram.of_spectrum(torch.complex(magnitude, torch.zeros_like(magnitude))[None])
    assert (again[0].T.clamp_min(1e-10).log() - mel).abs().mean() < 0.06


@pytest.mark.parametrize("preset", ["hifigan", "nvidia"])
def test_griffin_lim_is_a_strong_baseline(speech, preset):
    pytest.importorskip("pesq")
    config = MEL_PRESETS[preset]
    mel = MelSpectrogram(config)(torch.from_numpy(speech))
    audio = griffin_lim(mel, config, 32)
    assert audio.shape == (mel.shape[1] * config.hop_length,)
    copy = audio.numpy()[: len(speech)].clip(-1, 1)
    # 3.9 (60 iterations) is the mean of this voice; least squares reaches 3.3.
    assert pesq_wb(speech, copy, RATE) > 3.4


def test_griffin_lim_repeats_by_seed():
    mel = MelSpectrogram(CONFIG)(torch.from_numpy(tone(150.0, 0.2)))
    first, again, other = (griffin_lim(mel, CONFIG, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_griffin_lim_of_one_silent_frame_is_silent():
    mel = torch.full((80, 1), math.log(CONFIG.log_floor))
    audio = griffin_lim(mel, CONFIG, 4)
    assert audio.shape == (256,)
    # Two steps of 16 bits: the log floor is that of a faint hiss.
    assert audio.abs().max() < 2**-14


# --- evaluation ---


class NoiseVocoder:
    """Stands in for a model: seeded noise, shaped by two refinement steps and as many as asked."""

    mel_config = CONFIG
    sample_rate = RATE
    refine_steps = 3
    is_bound = False

    def __init__(self) -> None:
        self.refinement = MelRefinement(CONFIG)
        self._spectrogram = MelSpectrogram(CONFIG)

    def draw(self, mel: Tensor, options: SynthesisOptions) -> Tensor:
        return self._made(mel, options, 0)

    def resynth(self, audio: Tensor, options: SynthesisOptions) -> Tensor:
        padded = functional.pad(audio, (0, -len(audio) % 256))
        steps = self.refine_steps if options.refine is None else options.refine
        return self._made(self.mel(padded), options, steps)[: len(audio)]

    def _made(self, mel: Tensor, options: SynthesisOptions, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(options.seed))
        noise = torch.randn(mel.shape[1] * 256, generator=generator)
        sigma = 1.0 if options.sigma is None else options.sigma
        return self.refinement(0.1 * sigma * noise[None], mel[None], 2 + steps)[0]

    def mel(self, audio: Tensor) -> Tensor:
        return self._spectrogram(audio)

    def log_prob(self, wav: Tensor, mel: Tensor) -> Tensor:
        return -wav.square().mean(-1)


@pytest.fixture(scope="module")
def folder(speech, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wavs")
    # No whole number of hops.
    write_audio(folder / "a.wav", speech[:-100], RATE)
    write_audio(folder / "silence.wav", np.zeros(8000, np.float32), RATE)
    (folder / "text.wav").write_text("not audio")
    return folder


def speech_samples(folder: Path) -> int:
    return len(read_audio(folder / "a.wav")[0])


def without_packages(monkeypatch) -> None:
    metrics = [metric for metric in METRICS if metric.package is None]
    absent = [m._replace(package="no_such_package") for m in METRICS if m.package]
    monkeypatch.setattr(copies_module, "METRICS", (*metrics, *absent))


PLAIN = OWN_OPTIONS.changed({"refine": 0})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:pesq")
def test_evaluate_reports_every_system(folder, monkeypatch):
    for package in ("pesq", "pystoi", "pyworld", "speechmos.dnsmos"):
        pytest.importorskip(package)
    # Measured above; fourteen times would take most of this file's time.
    monkeypatch.setattr(evaluation_module, "dnsmos", lambda audio, rate: float(len(audio)))
    calls = []
    result = evaluate(
        NoiseVocoder(), sorted(folder.iterdir()), progress=lambda *call: calls.append(call)
    )
    rows = {row.name: row for row in result.rows}
    assert list(rows) == [
        "recording",
        "model + 0 steps",
        "model + 3 steps",
        "Griffin-Lim 60",
        "Griffin-Lim 32 + 3 steps",
        "smooth Griffin-Lim 60",
        "smooth Griffin-Lim 32 + 3 steps",
    ]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert result.n_clips == 2
    assert [Path(bad.path).name for bad in result.bad_files] == ["text.wav"]
    # What is measured has the recordings' lengths.
    for row in rows.values():
        assert row.scores["DNSMOS"] == (speech_samples(folder) + 8000) / 2
    assert set(rows["recording"].scores) == {"DNSMOS"}
    assert set(rows["model + 0 steps"].scores) == set(COLUMNS)
    # Silence has no utterance, no voiced frame, and nothing for STOI.
    failed = rows["model + 0 steps"].failed
    assert failed == {"PESQ-WB": 1, "STOI": 1, "V/UV F1": 1, "F0 error (cents)": 1}
    assert result.missing == ()

    unrefined, refined = rows["model + 0 steps"].scores, rows["model + 3 steps"].scores
    assert refined["log-mel L1"] < unrefined["log-mel L1"]
    smooth, plain = rows["smooth Griffin-Lim 60"].scores, rows["Griffin-Lim 60"].scores
    assert smooth["PESQ-WB"] > plain["PESQ-WB"] > unrefined["PESQ-WB"]
    assert -1.0 < result.draw_correlation < 0.9

    assert json.loads(result.to_json())["rows"][0]["name"] == "recording"
    header, *lines = result.table()
    assert header[1:] == list(COLUMNS)
    assert [line[0] for line in lines] == list(rows)
    assert {len(line) for line in lines} == {len(header)}
    assert lines[0][1] == "-" and lines[1][1] == f"{unrefined['PESQ-WB']:.3f}"


def test_evaluate_weighs_likelihoods_by_samples(folder, monkeypatch):
    without_packages(monkeypatch)
    monkeypatch.setattr(copies_module, "copies", lambda vocoder, audio, options: {})
    files = [folder / "a.wav", folder / "silence.wav"]
    both, speech_alone, silence_alone = (
        evaluate(NoiseVocoder(), chosen, PLAIN) for chosen in (files, files[:1], files[1:])
    )
    share = speech_alone.seconds / both.seconds
    expected = share * speech_alone.log_prob_speech + (1 - share) * silence_alone.log_prob_speech
    assert both.log_prob_speech == pytest.approx(expected, rel=1e-6)
    assert both.log_prob_speech != pytest.approx(both.log_prob_draw, rel=1e-6)


def test_likelihoods_are_of_draws_at_sigma_1(folder, monkeypatch):
    without_packages(monkeypatch)
    monkeypatch.setattr(copies_module, "copies", lambda vocoder, audio, options: {})
    first, second = (
        evaluate(NoiseVocoder(), [folder / "a.wav"], SynthesisOptions(sigma=sigma))
        for sigma in (1.0, 0.3)
    )
    assert first.log_prob_draw == second.log_prob_draw


def test_evaluate_leaves_out_and_names_what_is_not_installed(folder, monkeypatch):
    without_packages(monkeypatch)
    result = evaluate(NoiseVocoder(), [folder / "a.wav"], PLAIN)
    assert set(result.missing) == set(COLUMNS) - {"log-mel L1"}
    assert result.table()[0][1:] == ["log-mel L1"]
    # Refined and unrefined model are one row when there are no steps.
    assert [row.name for row in result.rows][1:3] == ["model + 0 steps", "Griffin-Lim 60"]


def test_evaluate_without_one_readable_file_is_an_error(folder):
    with pytest.raises(AudioError, match=r"text\.wav"):
        evaluate(NoiseVocoder(), [folder / "text.wav"])
    with pytest.raises(AudioError, match="no recording"):
        evaluate(NoiseVocoder(), [])


def test_a_fault_of_ours_in_one_clip_does_not_end_the_evaluation(folder, monkeypatch):
    def broken(vocoder, audio, options):
        if len(audio) == 8000:
            raise ZeroDivisionError("never thought of")
        return {}

    without_packages(monkeypatch)
    monkeypatch.setattr(copies_module, "copies", broken)
    result = evaluate(NoiseVocoder(), sorted(folder.iterdir()), PLAIN)
    assert result.n_clips == 1
    ours, theirs = result.bad_files
    assert ours.is_ours and not theirs.is_ours
    assert ours.message.endswith("internal error (ZeroDivisionError): never thought of")


def test_select_ids_keeps_the_lists_order_and_names_what_is_absent(tmp_path):
    files = [tmp_path / "a.wav", tmp_path / "b.flac", tmp_path / "c.wav"]
    ids = tmp_path / "val.txt"
    ids.write_text("c\nb\n")
    assert select_ids(files, ids) == [files[2], files[1]]
    ids.write_text("c\nd\n")
    with pytest.raises(DataError, match="1 clips that are not there: d"):
        select_ids(files, ids)
    with pytest.raises(DataError, match=r"none\.txt"):
        select_ids(files, tmp_path / "none.txt")


def test_evaluate_says_what_it_did_to_recordings(speech, tmp_path, caplog, monkeypatch):
    without_packages(monkeypatch)
    write_audio(tmp_path / "a.wav", speech[:8000], 16000)
    evaluate(NoiseVocoder(), [tmp_path / "a.wav"], PLAIN)
    assert "resampled from 16000 Hz to 22050 Hz (1 files)" in caplog.text
