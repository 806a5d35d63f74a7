"""Folders by batches: the same audio, each file once, errors by name, bounded reading ahead."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

import waveflow
from waveflow.cli import ahead
from waveflow.cli.ahead import Steps, work_ahead
from waveflow.cli.main import main
from waveflow.engine.options import SynthesisOptions
from waveflow.engine.together import FRAMES_ON_GPU, MOST_ON_CPU, batches, speak_together
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import MelMismatchError


def some_mel(n_frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (-8 + 0.5 * rng.standard_normal((80, n_frames))).astype(np.float32)


@pytest.fixture(scope="module")
def vocoder(tiny_model: Path) -> Vocoder:
    return waveflow.load(tiny_model)


def test_on_a_cpu_short_mels_of_one_length_go_together() -> None:
    frames = [50, 300, 55, 310, 52, 90, 60]
    found = list(batches(frames, "cpu"))
    assert found == [[0, 4, 2, 6], [5], [1], [3]]
    assert sorted(i for batch in batches([40] * 30, "cpu") for i in batch) == list(range(30))
    assert max(map(len, batches([40] * 30, "cpu"))) == MOST_ON_CPU
    assert list(batches([], "cpu")) == []


def test_on_a_gpu_batches_are_of_bounded_size_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(10, 2000, 500).tolist()
    for batch in batches(frames, "cuda"):
        longest, shortest = max(frames[i] for i in batch), min(frames[i] for i in batch)
        assert longest * len(batch) <= FRAMES_ON_GPU and longest <= 1.25 * shortest
    assert len(list(batches(frames, "cuda"))) < 100


def test_each_gets_what_it_gets_alone(vocoder: Vocoder) -> None:
    mels = [some_mel(n, n) for n in (40, 44, 50)]
    options = [SynthesisOptions(seed=i) for i in range(3)]
    for speech, mel, own in zip(speak_together(vocoder, mels, options), mels, options, strict=True):
        assert not isinstance(speech, Exception)
        expected = vocoder.synthesise(mel, own)
        np.testing.assert_allclose(speech.audio, expected.audio, atol=1e-5)
        assert speech.notes == expected.notes


def test_one_that_is_wrong_does_not_hurt_the_others(vocoder: Vocoder) -> None:
    mels = [some_mel(40), np.full((80, 40), np.nan, np.float32), some_mel(40)[:70]]
    first, *others = speak_together(vocoder, mels, [SynthesisOptions()] * 3)
    assert not isinstance(first, Exception)
    assert all(isinstance(other, MelMismatchError) for other in others)


def test_only_mels_of_the_models_own_convention_go_together(
    vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are told, turned or converted one by one: a batch would be judged as a whole."""
    sizes = []
    whole = Vocoder.synthesise

    def counted(self, mel, options, lengths=None):
        sizes.append(np.shape(mel))
        return whole(self, mel, options, lengths)

    monkeypatch.setattr(Vocoder, "synthesise", counted)
    turned = [np.ascontiguousarray(some_mel(90, i).T) for i in range(2)]
    for speech in speak_together(vocoder, turned, [SynthesisOptions(time_major=True)] * 2):
        assert not isinstance(speech, Exception) and len(speech.audio) == 90 * 256
    scaled = [some_mel(90, i) / np.float32(np.log(10)) for i in range(2)]
    speak_together(vocoder, scaled, [SynthesisOptions(convention="log10")] * 2)
    assert sizes == [(90, 80)] * 2 + [(80, 90)] * 2


def test_a_batch_that_is_too_large_is_spoken_one_by_one(
    vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Vocoder.synthesise

    def short_of_memory(self, mel, options, lengths=None):
        if np.ndim(mel) == 3:
            raise RuntimeError("out of memory")
        return whole(self, mel, options, lengths)

    monkeypatch.setattr(Vocoder, "synthesise", short_of_memory)
    for speech in speak_together(vocoder, [some_mel(40)] * 2, [SynthesisOptions()] * 2):
        assert not isinstance(speech, Exception) and len(speech.audio) == 40 * 256


def test_a_folder_of_short_mels(tiny_model: Path, tmp_path: Path, capfd) -> None:
    vocoder = waveflow.load(tiny_model)
    folder = tmp_path / "mels"
    (folder / "inner").mkdir(parents=True)
    mels = {f"{'inner/' if i % 2 else ''}{i}": some_mel(30 + i, i) for i in range(20)}
    for name, mel in mels.items():
        np.save(folder / f"{name}.npy", mel)
    np.save(folder / "bad.npy", some_mel(30)[:60])
    (folder / "worse.npy").write_bytes(b"no array")
    out = tmp_path / "wavs"
    models = ("--model", str(tiny_model), "--float", "--seed", "4")
    assert main(["vocode", str(folder), "-o", str(out), *models]) == 2
    err = capfd.readouterr().err
    assert "20 written" in err and "2 failed" in err
    assert "bad.npy: this mel has 60 bands" in err and "worse.npy" in err
    for name, mel in mels.items():
        audio, _ = soundfile.read(out / f"{name}.wav", dtype="float32")
        np.testing.assert_allclose(audio, vocoder(mel, seed=4), atol=1e-5)
    assert len(list(out.rglob("*.*"))) == 20


def test_reading_ahead_stays_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_MOST_FILES", 4)
    monkeypatch.setattr(ahead, "_MOST_BYTES", 100)
    sizes = [10] * 9 + [90, 20, 500, 10]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}").write_bytes(bytes(size))
    seen: list[int] = []

    def make(paths: Sequence[Path], read: Sequence[int]) -> Iterator[tuple[int, int]]:
        seen.append(len(paths))
        assert len(paths) <= 4 and (sum(read) <= 100 or len(paths) == 1)
        return enumerate(read)

    steps = Steps(lambda path: path.stat().st_size, make, lambda target, size: None)
    names = {str(tmp_path / f"{i}"): f"{i}" for i in range(len(sizes))}
    done = dict(work_ahead(names, tmp_path / "out", steps))
    assert list(done) and set(done) == set(names) and not any(done.values())
    assert sum(seen) == len(sizes)
