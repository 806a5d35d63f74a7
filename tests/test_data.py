"""Corpora on disk, F0 tracks, the training cache and the segments drawn from it."""

import builtins
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from forking import Forked, Outcome

from waveflow.audio.f0 import track_f0
from waveflow.audio.mel import MelConfig
from waveflow.data import clips as clips_module
from waveflow.data.cache import TrainingCache
from waveflow.data.corpus import read_corpus, val_ids
from waveflow.data.prepare import prepare
from waveflow.data.segments import SegmentSampler
from waveflow.errors import ConfigError, DataError

RATE = 22050
HOP = 256
MEL = MelConfig(sample_rate=RATE, hop_length=HOP)
STEP = 2.0**-15

try:
    import pyworld  # noqa: F401

    PYWORLD_PROBLEM = ""
except ImportError as error:
    PYWORLD_PROBLEM = str(error)

needs_pyworld = pytest.mark.skipif(bool(PYWORLD_PROBLEM), reason=f"pyworld: {PYWORLD_PROBLEM}")


def harmonic_tone(f0: np.ndarray, sample_rate: int) -> np.ndarray:
    """A tone of ten equal harmonics, which is a rounded pulse train. f0: (T,) in Hz."""
    phase = 2 * np.pi * (np.cumsum(f0) - f0[0]) / sample_rate
    return sum(0.05 * np.cos(k * phase) for k in range(1, 11))


def write_noise(path: Path, samples: int, seed: int, sample_rate: int = RATE) -> np.ndarray:
    """Writes noise to a 16-bit file and returns it, (samples,) int16."""
    audio = np.random.default_rng(seed).integers(-12000, 12001, samples).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, sample_rate, subtype="PCM_16")
    return audio


def block_starts(audio: np.ndarray, sample_rate: int, hop_length: int) -> np.ndarray:
    """Stands in for F0: the first sample of each block, so that a shift by a sample shows."""
    frames = len(audio) // hop_length
    return np.rint(audio[: frames * hop_length : hop_length] / STEP).astype(np.float32)


@pytest.fixture
def fake_f0(monkeypatch):
    monkeypatch.setattr(clips_module, "track_f0", block_starts)


@pytest.fixture
def corpus(tmp_path):
    """Six clips in LJSpeech's layout, .wav and .flac, of which one is for validation."""
    folder = tmp_path / "voice"
    lengths = [5 * HOP, 40 * HOP + 17, 90 * HOP + 255, 31 * HOP, 64 * HOP, 20 * HOP + 1]
    for i, samples in enumerate(lengths):
        write_noise(folder / "wavs" / f"clip{i}{('.wav', '.flac')[i % 2]}", samples, seed=i)
    lines = [f"clip{i}|text|text" for i in reversed(range(len(lengths)))]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    (folder / "val.txt").write_text("clip3\n")
    return folder


@pytest.fixture
def cache(corpus, tmp_path, fake_f0):
    prepare([corpus], tmp_path / "cache", MEL, workers=1)
    return TrainingCache(tmp_path / "cache")


# --- corpora ---


def test_ljspeech_layout(corpus):
    read = read_corpus(corpus)
    assert read.name == "voice"
    assert [clip.id for clip in read.clips] == [f"clip{i}" for i in (5, 4, 3, 2, 1, 0)]
    assert [clip.id for clip in read.clips if clip.split == "val"] == ["clip3"]
    assert [clip.path.name for clip in read.clips[:2]] == ["clip5.flac", "clip4.wav"]


def test_plain_folder(tmp_path):
    for name in ("b.flac", "a.wav", "a.flac", "c.WAV", "._a.wav", "p1/a.wav", ".p/a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    read = read_corpus(tmp_path)
    assert [clip.path.name for clip in read.clips] == ["a.wav", "b.flac", "c.WAV", "a.wav"]
    assert [clip.id for clip in read.clips] == ["a", "b", "c", "p1/a"]
    assert [clip.split for clip in read.clips].count("val") == 1
    assert read.ignored == ((tmp_path / "a.flac", "a.wav has the same id"),)


def test_files_that_metadata_does_not_name_are_told(corpus):
    write_noise(corpus / "wavs" / "extra.wav", HOP, seed=7)
    assert read_corpus(corpus).ignored == ((corpus / "wavs/extra.wav", "not in metadata.csv"),)


def test_a_folder_of_corpora_is_not_one_corpus(corpus):
    with pytest.raises(DataError, match=r"holds 1 corpora \(voice\): name each of them"):
        read_corpus(corpus.parent)


def test_metadata_ids_may_carry_suffixes_dots_and_a_byte_order_mark(tmp_path):
    for name in ("v1.2_a.wav", "v1.2_b.wav"):
        write_noise(tmp_path / "wavs" / name, 10, seed=0)
    lines = "v1.2_a|one\n\nv1.2_b.wav|two\n"
    (tmp_path / "metadata.csv").write_text(lines, encoding="utf-8-sig")
    assert [clip.id for clip in read_corpus(tmp_path).clips] == ["v1.2_a", "v1.2_b"]


def test_val_split_is_stable_small_and_never_everything():
    ids = [f"LJ{i:05d}" for i in range(5000)]
    chosen = val_ids(ids)
    # 2 % of 5000 with a standard deviation of 10.
    assert 60 <= len(chosen) <= 140
    assert val_ids(ids[::-1]) == chosen
    assert val_ids(ids[:4000]) == {i for i in chosen if i in ids[:4000]}
    assert sorted(chosen)[:3] == ["LJ00127", "LJ00150", "LJ00200"]
    assert val_ids(["one"]) == set()
    assert [len(val_ids([f"{i}a", f"{i}b"])) for i in range(200)] == [1] * 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f / "nowhere", "no such folder"),
        (lambda f: [p.unlink() for p in (f / "wavs").iterdir()], "no audio in"),
        (lambda f: (f / "wavs/clip4.wav").unlink(), r"names 1 of 6 clips .* 'clip4'"),
        (lambda f: (f / "metadata.csv").write_text("\n"), "is empty"),
        (lambda f: (f / "val.txt").write_text("clip3\nclip9\n"), r"names 1 ids .* 'clip9'"),
    ],
)
def test_corpus_errors(corpus, change, message):
    changed = change(corpus)
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(changed if isinstance(changed, Path) else corpus)
    assert "\n" not in str(caught.value)


# --- F0 ---


@needs_pyworld
@pytest.mark.parametrize("hop_length", [256, 255])
@pytest.mark.parametrize("f0", [80.0, 123.0, 310.0])
def test_f0_of_a_tone(f0, hop_length):
    audio = harmonic_tone(np.full(RATE, f0), RATE)
    track = track_f0(audio, RATE, hop_length)
    assert track.shape == (RATE // hop_length,)
    assert track.dtype == np.float32
    inner = track[10:-10]
    assert np.abs(inner / f0 - 1).max() < 0.01


@needs_pyworld
def test_f0_is_at_the_centre_of_each_block():
    hop = 512
    true = np.linspace(100, 300, RATE)
    track = track_f0(harmonic_tone(true, RATE), RATE, hop)
    centres = true[hop // 2 :: hop][: len(track)]
    # Half a hop off would be 2.3 Hz.
    assert abs(np.mean((track - centres)[8:-8])) < 0.6


@needs_pyworld
@pytest.mark.parametrize(
    ("rate", "hop"), [(16000, 200), (24000, 300), (44100, 512), (48000, 480), (48000, 512)]
)
def test_f0_at_other_rates(rate, hop):
    true = np.linspace(100, 300, rate)
    track = track_f0(harmonic_tone(true, rate), rate, hop)
    assert track.shape == (rate // hop,)
    centres = true[hop // 2 :: hop][: len(track)]
    # A hop is 2 to 2.5 Hz here, so half a hop off would be 1 Hz.
    assert abs(np.median((track - centres)[8:-8])) < 0.5
    assert np.abs((track / centres)[8:-8] - 1).max() < 0.02


@needs_pyworld
@pytest.mark.parametrize("samples", [HOP, HOP + 1, RATE])
def test_f0_of_silence_is_unvoiced(samples):
    np.testing.assert_array_equal(track_f0(np.zeros(samples), RATE, HOP), np.zeros(samples // HOP))


def test_f0_without_the_package(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pyworld":
            raise ImportError("No module named 'pyworld'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'waveflow\[train\]'"):
        track_f0(np.zeros(RATE), RATE, HOP)


# --- cache ---


def test_cache_holds_the_files_bit_for_bit(corpus, cache):
    cache.verify()
    assert [clip.id for clip in cache.clips("val")] == ["clip3"]
    assert [clip.id[-1] for clip in cache.clips("train")] == ["5", "4", "2", "1", "0"]
    for clip in cache.manifest.clips:
        path = next((corpus / "wavs").glob(f"{clip.id}.*"))
        samples, _ = soundfile.read(path, dtype="int16")
        np.testing.assert_array_equal(cache.audio(clip), samples)
        np.testing.assert_array_equal(cache.f0(clip), samples[: clip.frames * HOP : HOP])
        assert clip.frames == len(samples) // HOP
        assert clip.corpus == "voice"
    assert cache.hours("val") == 31 * HOP / RATE / 3600
    [(clip, audio, mel)] = cache.val_clips()
    assert audio.dtype == torch.float32
    np.testing.assert_array_equal(audio, cache.audio(clip) * np.float32(STEP))
    assert mel is None
    assert cache.f0(clip).shape == (31,)


@needs_pyworld
def test_workers_do_not_change_the_cache(corpus, tmp_path):
    seen = []
    for workers, name in ((1, "one"), (2, "two")):
        report = prepare(
            [corpus], tmp_path / name, MEL, lambda *done: seen.append(done), workers=workers
        )
    assert seen == [(i, 6) for i in range(1, 7)] * 2
    assert (report.train.clips, report.val.clips) == (5, 1)
    for name in ("audio.npy", "f0.npy", "manifest.json", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@needs_pyworld
def test_other_rates_and_channels_are_converted(tmp_path):
    tone = harmonic_tone(np.full(16000, 150.0), 16000)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/a.wav", np.stack([tone, tone], 1), 16000, subtype="PCM_16")
    report = prepare([tmp_path / "in"], tmp_path / "out", MEL, workers=1)
    cache = TrainingCache(tmp_path / "out")
    [clip] = cache.clips("train")
    assert abs(clip.samples - RATE) <= 1
    assert report.train.hours == pytest.approx(1 / 3600, rel=1e-3)
    assert len(report.notes) == 2
    assert all("(1 of 1 clips)" in note for note in report.notes)
    # The same tone made at the new rate, away from the ends, where the resampler's filter shows;
    # a shift by one sample would correlate at 0.97.
    direct = harmonic_tone(np.full(RATE, 150.0), RATE)
    assert np.corrcoef(cache.audio(clip)[2000:20000], direct[2000:20000])[0, 1] > 0.9999
    assert np.abs(cache.f0(clip)[10:-10] / 150 - 1).max() < 0.01


def test_several_corpora_follow_each_other(corpus, tmp_path, fake_f0):
    for seed, name in enumerate(("a", "b")):
        write_noise(tmp_path / "other" / f"{name}.wav", 10 * HOP, seed=90 + seed)
    prepare([tmp_path / "other", corpus], tmp_path / "out", MEL, workers=1)
    clips = TrainingCache(tmp_path / "out").manifest.clips
    assert [clip.corpus for clip in clips] == ["other"] * 2 + ["voice"] * 6
    with pytest.raises(DataError, match="given twice"):
        prepare([corpus, corpus / "."], tmp_path / "out", MEL, workers=1)
    with pytest.raises(DataError, match="no corpus"):
        prepare([], tmp_path / "out", MEL, workers=1)


def test_unusable_clips_are_left_out_and_listed(corpus, tmp_path, fake_f0):
    (corpus / "wavs/clip0.wav").write_bytes(b"not audio")
    write_noise(corpus / "wavs/clip1.flac", HOP - 1, seed=1)
    report = prepare([corpus], tmp_path / "out", MEL, workers=1)
    assert (report.train.clips, report.val.clips) == (3, 1)
    short, unreadable = report.left_out
    assert (short.reason, unreadable.reason) == ("too short", "unreadable")
    assert "clip1.flac is shorter than one hop: 255 of 256 samples" in short.detail
    assert "clip0.wav" in unreadable.detail
    assert len(TrainingCache(tmp_path / "out").manifest.clips) == 4


def test_no_usable_clip_is_an_error(tmp_path, fake_f0):
    write_noise(tmp_path / "in/a.wav", 10, seed=0)
    with pytest.raises(DataError, match=r"none of 1 clips is usable.*a\.wav"):
        prepare([tmp_path / "in"], tmp_path / "out", MEL, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_out_is_replaced_only_if_empty_or_a_cache(corpus, cache, tmp_path):
    out = tmp_path / "cache"
    write_noise(corpus / "wavs/clip4.wav", 8 * HOP, seed=4)
    prepare([corpus], out, MEL, workers=1)
    assert TrainingCache(out).clips("train")[1].samples == 8 * HOP
    (tmp_path / "empty").mkdir()
    prepare([corpus], tmp_path / "empty", MEL, workers=1)
    TrainingCache(tmp_path / "empty").verify()

    (out / "my notes.txt").write_text("precious")
    with pytest.raises(DataError, match="something else than a training cache"):
        prepare([corpus], out, MEL, workers=1)
    with pytest.raises(DataError, match="something else than a training cache"):
        prepare([corpus], corpus, MEL, workers=1)
    with pytest.raises(DataError, match="is a file"):
        prepare([corpus], out / "my notes.txt", MEL, workers=1)
    with pytest.raises(DataError, match="cannot write the cache"):
        prepare([corpus], out / "my notes.txt" / "below", MEL, workers=1)
    assert (out / "my notes.txt").read_text() == "precious"


def test_damaged_caches_are_refused(cache, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(DataError, match=r"no manifest\.json"):
        TrainingCache(tmp_path)

    audio = folder / "audio.npy"
    good = audio.read_bytes()
    audio.write_bytes(good[:-2] + b"\x12\x34")
    with pytest.raises(DataError, match=r"audio\.npy is damaged"):
        TrainingCache(folder).verify()
    audio.write_bytes(good[:-2])
    with pytest.raises(DataError, match=r"cannot read .*audio\.npy"):
        TrainingCache(folder)
    np.save(audio, np.zeros(3, np.int16))
    with pytest.raises(DataError, match=r"holds int16 \(3,\)"):
        TrainingCache(folder)
    np.save(audio, np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"cannot read .*audio\.npy"):
        TrainingCache(folder)
    audio.write_bytes(good)

    manifest = folder / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["clips"][1]["frame_offset"] += 1
    manifest.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="clip4 is inconsistent"):
        TrainingCache(folder)
    manifest.write_text(json.dumps(fields | {"format": 1}))
    with pytest.raises(DataError, match=r"format.*run waveflow prepare again"):
        TrainingCache(folder)
    manifest.write_text("{")
    with pytest.raises(DataError, match="cannot use"):
        TrainingCache(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_reading_a_cache_needs_no_audio_library(tmp_path):
    def action() -> int:
        for name in [name for name in sys.modules if name.startswith("waveflow.")]:
            del sys.modules[name]
        for name in ("soundfile", "soxr", "librosa", "pyworld"):
            sys.modules[name] = None  # an import of it fails
        import waveflow.data.cache
        import waveflow.data.segments  # noqa: F401

        return 0

    assert Forked(action, tmp_path).wait() == Outcome(0, "", "")


# --- segments ---


def sampler(cache: TrainingCache, gain_range=(1.0, 1.0), seed=0, batch_size=16) -> SegmentSampler:
    return SegmentSampler(cache, 24, batch_size, MEL, seed, gain_range)


def test_a_step_repeats_exactly(cache):
    first = sampler(cache, (0.5, 2.0)).batch(5)
    again = sampler(cache, (0.5, 2.0))
    again.batch(0)
    assert torch.equal(again.batch(5).audio, first.audio)
    assert torch.equal(again.batch(5).f0, first.f0)
    assert not torch.equal(again.batch(6).audio, first.audio)
    assert not torch.equal(sampler(cache, (0.5, 2.0), seed=1).batch(5).audio, first.audio)


def test_segments_are_the_clips_own_samples_aligned_with_f0(cache):
    margin = MEL.margin_frames * HOP
    origins = []
    for step in range(20):
        batch = sampler(cache).batch(step)
        assert batch.audio.shape == (16, 24 * HOP + 2 * margin)
        assert batch.audio.dtype == batch.f0.dtype == torch.float32
        for audio, f0 in zip(batch.audio.numpy(), batch.f0.numpy(), strict=True):
            # The stand-in for F0 is the first sample of each block, which tells where this is.
            [(clip, start)] = [
                (clip, frame)
                for clip in cache.clips("train")
                for frame in np.flatnonzero(cache.f0(clip) == f0[0])
                if np.array_equal(cache.f0(clip)[frame:][:2], f0[:2])
            ]
            padded = np.zeros(max(clip.samples, 24 * HOP) + 2 * margin + HOP)
            padded[margin : margin + clip.samples] = cache.audio(clip) * STEP
            expected = padded[start * HOP :][: len(audio)]
            assert np.abs(audio - expected).max() <= 0.5001 * STEP
            f0_expected = np.pad(cache.f0(clip), (0, 24))[start : start + 24]
            np.testing.assert_array_equal(f0, f0_expected)
            assert start <= max(clip.frames - 24, 0)
            origins.append((clip.id, start))
    starts = {start for i, start in origins if i == "clip2"}
    assert min(starts) < 8
    assert max(starts) > 58


def test_clips_are_drawn_in_proportion_to_their_length(cache):
    drawer = SegmentSampler(cache, 2, 64, MEL, seed=0)
    # Two values of the stand-in for F0 tell the clip.
    pairs = np.concatenate([drawer.batch(step).f0.numpy() for step in range(400)])
    clips = cache.clips("train")
    total = sum(clip.frames for clip in clips)
    for clip in clips:
        own = {tuple(pair) for pair in np.lib.stride_tricks.sliding_window_view(cache.f0(clip), 2)}
        share = sum(tuple(pair) in own for pair in pairs) / len(pairs)
        expected = clip.frames / total
        deviation = np.sqrt(expected * (1 - expected) / len(pairs))
        assert share == pytest.approx(expected, abs=3.5 * deviation)


def test_dequantisation_noise_is_uniform_over_one_step(cache):
    batch = sampler(cache).batch(0)
    noise = batch.audio.numpy() / STEP
    noise -= np.rint(noise)
    # 110 thousand draws: the standard deviation of their mean is 0.0009, of their variance 0.0003.
    assert abs(noise.mean()) < 0.005
    assert noise.var() == pytest.approx(1 / 12, abs=0.0015)


def test_gain_stays_in_range_and_below_full_scale(cache):
    # The same draws but for the gain, so the ratio of the peaks is the gain.
    own_peaks = sampler(cache, batch_size=64).batch(0).audio.abs().amax(1)
    peaks = sampler(cache, (0.25, 8.0), batch_size=64).batch(0).audio.abs().amax(1)
    gains = peaks / own_peaks
    # float32 can round a gain of 1 / peak up.
    assert peaks.max() <= 1 + 1e-6
    assert gains.min() >= 0.25 - 1e-6
    # Peaks are 0.37 (12000 / 32768), so of 5 octaves of gain the upper 1.55 are limited: 31 %,
    # within four standard deviations (0.058) of 64 draws.
    limited = peaks > 1 - 1e-6
    assert limited.float().mean() == pytest.approx(0.31, abs=0.23)
    # The others are uniform in octaves between -2 and 1.45, mean -0.28, deviation 1.
    assert gains[~limited].log2().mean() == pytest.approx(-0.28, abs=0.6)
    assert torch.equal(sampler(cache, (0.25, 8.0)).batch(0).f0, sampler(cache).batch(0).f0)


def test_sampler_errors(cache, corpus, tmp_path):
    with pytest.raises(DataError, match="sample rate 22050 and hop 256, the mel has 22050 and 200"):
        SegmentSampler(cache, 24, 16, MelConfig(sample_rate=RATE, hop_length=200), seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        SegmentSampler(cache, 0, 16, MEL, seed=0)
    with pytest.raises(ConfigError, match="gain_range"):
        SegmentSampler(cache, 24, 16, MEL, seed=0, gain_range=(2.0, 1.0))
    (corpus / "val.txt").write_text("\n".join(f"clip{i}" for i in range(6)))
    prepare([corpus], tmp_path / "held out", MEL, workers=1)
    with pytest.raises(DataError, match="no training clips"):
        sampler(TrainingCache(tmp_path / "held out"))
