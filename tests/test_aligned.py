"""Training on mels that an acoustic model wrote: `prepare --mels`, segments, validation."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_voice
from tiny_training import HOP, MEL, MODEL, RATE, perturbed

from waveflow.audio.io import read_audio, read_channel
from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.cli.main import main
from waveflow.data import clips as clips_module
from waveflow.data.cache import MEL_FILE, TrainingCache
from waveflow.data.prepare import prepare
from waveflow.data.segments import SegmentSampler
from waveflow.errors import DataError
from waveflow.processes import Group
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.loop import Trainer
from waveflow.training.validation import score_clips

CENTRED = MEL.model_copy(update={"padding": "center"})
N_CLIPS = 4
FLOOR = math.log(MEL.log_floor)


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the recordings that are read; F0 is made up, not tracked: 1, 2, 3, ... Hz."""
    names = []

    def count(path: Path) -> tuple[np.ndarray, int, list[str]]:
        names.append(Path(path).name)
        return read_channel(path)

    def ramp(audio: np.ndarray, rate: int, hop: int) -> np.ndarray:
        return np.arange(1, len(audio) // hop + 1, dtype=np.float32)

    monkeypatch.setattr(clips_module, "read_channel", count)
    monkeypatch.setattr(clips_module, "track_f0", ramp)
    return names


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four voices of different lengths, none a whole number of hops."""
    folder = tmp_path / "voice"
    folder.mkdir()
    for i in range(N_CLIPS):
        voice = make_voice(0.6 + 0.1 * i, i, RATE)
        soundfile.write(folder / f"clip{i}.wav", voice[: len(voice) // HOP * HOP + 9], RATE)
    return folder


def mels_of(corpus: Path, config: MelConfig = MEL) -> dict[str, np.ndarray]:
    mel = MelSpectrogram(config)
    return {
        path.stem: mel(torch.from_numpy(read_audio(path)[0])).numpy()
        for path in sorted(corpus.iterdir())
    }


def write_mels(folder: Path, mels: dict[str, np.ndarray]) -> Path:
    """As .npy and .pt in turn."""
    folder.mkdir()
    for i, (name, mel) in enumerate(mels.items()):
        if i % 2:
            torch.save(torch.from_numpy(mel.copy()), folder / f"{name}.pt")
        else:
            np.save(folder / f"{name}.npy", mel)
    return folder


def own_and_given(corpus: Path, config: MelConfig) -> tuple[TrainingCache, TrainingCache]:
    """Two caches of a corpus: without mels, and given those that waveflow would compute."""
    mels = write_mels(corpus.parent / "mels", mels_of(corpus, config))
    own, given = corpus.parent / "own", corpus.parent / "given"
    prepare([corpus], own, config, workers=1)
    report = prepare([corpus], given, config, workers=1, mels=mels)
    assert not report.notes and not report.left_out
    return TrainingCache(own), TrainingCache(given)


def trainer(cache: TrainingCache, out: Path, mel: MelConfig, **train: object) -> Trainer:
    settings: dict[str, object] = {"steps": 2, "batch_size": 4, "segment_frames": 32}
    config = TrainConfig(**(settings | {"gain_range": (0.3, 1.0), "pitch_steps": 0} | train))
    return Trainer(Recipe(model=MODEL, mel=mel, train=config), cache, out)


@pytest.mark.parametrize("config", [MEL, CENTRED], ids=["hop", "center"])
def test_own_mels_given_as_files_train_as_no_mels_do(corpus, tmp_path, config):
    own, given = own_and_given(corpus, config)
    one = trainer(own, tmp_path / "a", config)
    two = trainer(given, tmp_path / "b", config)
    for step in range(4):
        one.step = two.step = step
        computed, from_files = one._batch(), two._batch()
        assert torch.equal(computed.audio, from_files.audio)
        assert torch.equal(computed.f0, from_files.f0)
        mel, same_mel = computed.mel, from_files.mel
        assert mel.shape == same_mel.shape == (4, MEL.n_mels, 32)
        # The noise of dequantisation tells them apart, by 0.01 at most where the voice is quiet
        # (not at the ends of clips, where silence stands in for the padding of a mel).
        inside = (mel - same_mel)[:, :, 4:-4].abs()
        assert inside.max() < 0.03
        # A frame's error would be this, and a gain's up to 1.2.
        assert (mel[:, :, 1:] - same_mel[:, :, :-1]).abs().median() > 0.04


def test_a_gain_moves_the_mel_by_its_logarithm_and_not_below_the_floor(corpus, tmp_path):
    mels = {name: np.full_like(mel, -3.0) for name, mel in mels_of(corpus).items()}
    for mel in mels.values():
        mel[0], mel[1] = FLOOR + 0.1, FLOOR - 2
    cache_folder = tmp_path / "cache"
    prepare([corpus], cache_folder, MEL, workers=1, mels=write_mels(tmp_path / "mels", mels))
    cache = TrainingCache(cache_folder)
    for power in (1, 2):
        config = MEL.model_copy(update={"power": power})
        mel = SegmentSampler(cache, 32, 3, config, 0, (0.25, 0.25)).batch(0).mel
        moved = torch.full_like(mel, -3.0 + power * math.log(0.25))
        moved[:, 0], moved[:, 1] = FLOOR, FLOOR - 2
        torch.testing.assert_close(mel, moved)
    # A segment longer than any clip ends in silence.
    long = SegmentSampler(cache, 200, 1, MEL, 0).batch(0)
    frames = int((long.f0 > 0).sum())
    assert 0 < frames < 200
    assert (long.mel[:, :, frames:] == np.float32(FLOOR)).all()
    assert (long.mel[:, 2:, :frames] == -3).all()


def test_lengths_that_differ_are_cut_or_left_out_and_reported(corpus, tmp_path):
    mels = mels_of(corpus)
    mels["clip0"] = mels["clip0"][:, :-3]
    mels["clip1"] = np.pad(mels["clip1"], ((0, 0), (0, 2)))
    n_frames = mels["clip2"].shape[1]
    mels["clip2"] = mels["clip2"][:, :-4]
    folder = write_mels(tmp_path / "mels", mels)
    report = prepare([corpus], tmp_path / "cache", MEL, workers=1, mels=folder)
    assert report.notes == (
        "audio cut to its mel by 3 frames (1 of 3 clips)",
        "mel cut to its audio by 2 frames (1 of 3 clips)",
    )
    [left_out] = report.left_out
    assert left_out.reason == "mel length"
    assert f"has {n_frames - 4} frames" in left_out.detail and left_out.detail.endswith(
        f"clip2.wav has {n_frames}"
    )
    cache = TrainingCache(tmp_path / "cache")
    cache.verify()
    assert cache.manifest.n_mels == MEL.n_mels
    for clip in cache.manifest.clips:
        expected = mels[clip.id][:, : clip.frames].T
        np.testing.assert_array_equal(cache.mel(clip), expected)
        assert cache.f0(clip)[-1] == clip.frames  # the ramp
    shortest = next(clip for clip in cache.manifest.clips if clip.id == "clip0")
    assert shortest.frames == mels["clip0"].shape[1]
    assert shortest.samples == shortest.frames * HOP


def test_mels_that_cannot_be_used_are_listed(corpus, tmp_path):
    mels = mels_of(corpus)
    del mels["clip0"]
    mels["clip1"] = mels["clip1"][:-1]
    folder = write_mels(tmp_path / "mels", mels)
    (folder / "clip2.npy").unlink(missing_ok=True)
    (folder / "clip2.pt").write_bytes(b"no tensor")
    soundfile.write(corpus / "clip4.wav", make_voice(0.6, 4, RATE), RATE)
    np.save(folder / "clip4.npy", mels_of(corpus)["clip4"])
    report = prepare([corpus], tmp_path / "cache", MEL, workers=1, mels=folder)
    reasons = {Path(left.file).stem: left.reason for left in report.left_out}
    assert reasons == {"clip0": "no mel", "clip1": "bad mel", "clip2": "bad mel"}
    assert "(19, " in next(x.detail for x in report.left_out if x.file.endswith("clip1.wav"))
    assert any("1 no mel, 2 bad mel" in line for line in report.lines())


def test_prepare_goes_on_shares_and_sees_changed_mels(corpus, tmp_path, reads):
    mels = mels_of(corpus)
    reads.clear()
    folder, out = write_mels(tmp_path / "mels", mels), tmp_path / "cache"

    store = torch.distributed.HashStore()

    def member(rank: int) -> None:
        prepare([corpus], out, MEL, workers=1, mels=folder, group=Group(rank, 2, store))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(member, range(2)))
    assert len(reads) == N_CLIPS
    before = (out / MEL_FILE).read_bytes()
    reads.clear()
    assert prepare([corpus], out, MEL, workers=1, mels=folder).kept == N_CLIPS
    assert not reads
    np.save(folder / "clip2.npy", mels["clip2"] + 1)
    assert prepare([corpus], out, MEL, workers=1, mels=folder).kept == N_CLIPS - 1
    assert reads == ["clip2.wav"]
    assert (out / MEL_FILE).read_bytes() != before
    prepare([corpus], out, MEL, workers=1)
    assert not (out / MEL_FILE).exists()
    assert TrainingCache(out).manifest.n_mels is None


def test_validation_and_statistics_take_the_given_mels(corpus, tmp_path):
    own, given = own_and_given(corpus, MEL)
    flow = perturbed()
    mel, device = MelSpectrogram(MEL), torch.device("cpu")
    computed = score_clips(flow, own, mel, device)[0]

    def none(audio: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the mel of the audio is not wanted")

    from_files = score_clips(flow, given, none, device)[0]
    assert (from_files[:, 0] == computed[:, 0]).all()
    # Dequantisation, and the samples after the last whole hop, move the computed one by 0.2 %.
    torch.testing.assert_close(from_files[:, 1], computed[:, 1], rtol=5e-3, atol=0)
    shifted = {name: mel + 1 for name, mel in mels_of(corpus).items()}
    prepare(
        [corpus], tmp_path / "more", MEL, workers=1, mels=write_mels(tmp_path / "plus", shifted)
    )
    more = TrainingCache(tmp_path / "more")
    other = score_clips(flow, more, none, device)[0]
    change = (other[:, 1] / from_files[:, 1] - 1).abs()
    assert (change > 10 * (computed[:, 1] / from_files[:, 1] - 1).abs()).all()
    for plus, zero in zip(more.mel_range(MEL), given.mel_range(MEL), strict=True):
        np.testing.assert_allclose(np.array(plus), np.array(zero) + 1, rtol=1e-6)


def test_a_run_trains_on_given_mels(corpus, tmp_path):
    mels = {name: np.full_like(mel, -3.0) for name, mel in mels_of(corpus).items()}
    prepare([corpus], tmp_path / "cache", MEL, workers=1, mels=write_mels(tmp_path / "mels", mels))
    cache = TrainingCache(tmp_path / "cache")
    run = trainer(cache, tmp_path / "run", MEL, gain_range=(1.0, 1.0))
    assert (run._batch().mel == -3).all()
    run.run()
    assert run.step == 2 and run.best is not None and math.isfinite(run.best)


def test_other_bands_in_the_recipe_are_an_error(corpus, tmp_path):
    _, given = own_and_given(corpus, MEL)
    config = MEL.model_copy(update={"n_mels": 24})
    with pytest.raises(DataError, match=r"20 bands.*24"):
        trainer(given, tmp_path / "run", config)


def test_folders_of_mels_that_cannot_be_meant(corpus, tmp_path):
    with pytest.raises(DataError, match="no such folder of mels"):
        prepare([corpus], tmp_path / "cache", MEL, mels=tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DataError, match="one corpus"):
        prepare([corpus, other], tmp_path / "cache", MEL, mels=corpus)


def test_the_command(corpus, tmp_path, monkeypatch, capsys):
    config = MelConfig(sample_rate=RATE, f_max=4000.0)
    monkeypatch.setattr("waveflow.cli.prepare._mel_settings", lambda name: config)
    folder = write_mels(tmp_path / "mels", mels_of(corpus, config))
    (folder / "clip0.npy").unlink()
    command = ["prepare", str(corpus), "-o", str(tmp_path / "cache"), "--mels", str(folder)]
    assert main([*command, "--workers", "1"]) == 0
    assert "1 files left out (1 no mel)" in capsys.readouterr().out
    assert TrainingCache(tmp_path / "cache").manifest.n_mels == 80
