"""`waveflow prepare`: what is left out, going on, sharing, archives, other rates, silence."""

import io
import json
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch.distributed
from conftest import make_voice
from killed_worker import killed_by_clip1

from waveflow.audio.io import read_channel
from waveflow.audio.mel import MelConfig
from waveflow.cli.main import main
from waveflow.data import archives
from waveflow.data import clips as clips_module
from waveflow.data import prepare as prepare_module
from waveflow.data.archives import download_ljspeech, unpack
from waveflow.data.cache import (
    AUDIO_FILE,
    F0_FILE,
    MANIFEST_FILE,
    TrainingCache,
)
from waveflow.data.clips import ClipTask, clipped_share, read_result, silent_share
from waveflow.data.corpus import val_ids
from waveflow.data.prepare import prepare
from waveflow.data.report import PrepareReport
from waveflow.errors import ConfigError, DataError
from waveflow.processes import Group

RATE, HOP = 22050, 256
MEL = MelConfig(sample_rate=RATE, hop_length=HOP)
# WaveGlow's upsampling grows with the square of the bands.
FEW_BANDS = MelConfig(sample_rate=RATE, hop_length=HOP, n_mels=8)
N_CLIPS = 6

try:
    import pyworld  # noqa: F401

    PYWORLD_PROBLEM = ""
except ImportError as error:
    PYWORLD_PROBLEM = str(error)

needs_pyworld = pytest.mark.skipif(bool(PYWORLD_PROBLEM), reason=f"pyworld: {PYWORLD_PROBLEM}")


def write(path: Path, audio: np.ndarray, sample_rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, sample_rate, subtype="PCM_16")


def noise(n_hops: int, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(n_hops * HOP)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six clips of noise, a folder of audio files alone."""
    for i in range(N_CLIPS):
        write(tmp_path / "voice" / f"clip{i}.wav", noise(4 + i, seed=i))
    return tmp_path / "voice"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the recordings that are read, as they are; F0 is not tracked."""
    names = []

    def count(path: Path) -> tuple[np.ndarray, int, list[str]]:
        names.append(Path(path).name)
        return read_channel(path)

    monkeypatch.setattr(clips_module, "read_channel", count)
    monkeypatch.setattr(
        clips_module, "track_f0", lambda audio, rate, hop: np.zeros(len(audio) // hop, np.float32)
    )
    return names


def interrupt_at(number: int):
    def progress(done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return progress


def content(cache: Path) -> dict[str, bytes]:
    return {name: (cache / name).read_bytes() for name in (AUDIO_FILE, F0_FILE, MANIFEST_FILE)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the report ---


def test_bad_clips_are_left_out_with_their_reasons(corpus, tmp_path, reads):
    write(corpus / "copy.flac", soundfile.read(corpus / "clip5.wav")[0])
    write(corpus / "silent.wav", np.zeros(5 * HOP))
    write(corpus / "hum.wav", 5e-4 * np.sin(np.arange(5 * HOP)))
    write(corpus / "short.wav", noise(1, seed=7)[:-1])
    write(corpus / "loud.wav", np.clip(100 * noise(5, seed=8), -1, 1))
    write(corpus / "clip0.flac", noise(5, seed=9))
    write(corpus / "empty.wav", np.zeros(0))
    (corpus / "text.wav").write_text("no audio")
    report = prepare([corpus], tmp_path / "cache", MEL, workers=1)
    reasons = {Path(clip.file).name: clip.reason for clip in report.left_out}
    assert reasons == {
        "copy.flac": "duplicate",
        "silent.wav": "silent",
        "hum.wav": "silent",
        "short.wav": "too short",
        "loud.wav": "clipped",
        "clip0.flac": "ignored",
        "empty.wav": "unreadable",
        "text.wav": "unreadable",
    }
    lines = report.lines()
    assert any("8 files left out" in line and "2 silent" in line for line in lines)
    for clip in report.left_out:
        assert Path(clip.file).name in clip.detail and clip.corpus == "voice"
        assert f"  {clip.detail}" in lines
    cached = TrainingCache(tmp_path / "cache").manifest.clips
    assert [clip.id for clip in cached] == ["clip0", "clip1", "clip2", "clip3", "clip4", "clip5"]
    stored = (tmp_path / "cache" / "report.json").read_bytes()
    assert PrepareReport.model_validate_json(stored) == report


def test_report_sums_up_what_is_kept(tmp_path, reads):
    quiet = np.concatenate([noise(6, seed=0), np.zeros(2 * HOP)])
    touching = noise(8, seed=1)
    touching[100:104] = 1.0
    write(tmp_path / "a" / "quiet.wav", quiet)
    write(tmp_path / "a" / "touching.wav", touching)
    write(tmp_path / "b" / "other.wav", noise(16, seed=2), 2 * RATE)
    report = prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "cache", MEL, workers=1)
    assert report.source_rates == {RATE: 2, 2 * RATE: 1}
    assert report.silence == pytest.approx(2 / 24)
    assert report.clipped == {str(tmp_path / "a/touching.wav"): 4 / (8 * HOP)}
    assert {name: amount.clips for name, amount in report.corpora.items()} == {"a": 2, "b": 1}
    total = sum(amount.hours for amount in report.corpora.values())
    assert total == report.train.hours + report.val.hours == 24 * HOP / RATE / 3600
    assert [Path(clip.file).name for clip in report.clips] == [
        "quiet.wav",
        "touching.wav",
        "other.wav",
    ]
    text = "\n".join(report.lines())
    assert "22050 Hz (2 clips), 44100 Hz (1 clips)" in text
    assert "8.3 % is below -60 dB" in text
    assert "1 clips touch full scale" in text and "0.20 %" in text
    assert "a: 2 clips" in text


@pytest.mark.parametrize("spoilt", ["silent", "broken", "a copy"])
@pytest.mark.parametrize("listed", [True, False], ids=["val.txt", "by hash"])
def test_validation_is_chosen_among_the_clips_that_are_kept(
    corpus, tmp_path, reads, listed, spoilt
):
    """Also where the corpus had named others; a corpus that named none gets none."""
    ids = [f"clip{i}" for i in range(N_CLIPS)]
    [first] = val_ids(ids)
    lost = {"clip2"} if listed else {first}
    if listed:
        (corpus / "val.txt").write_text("clip2\n")
    for name in lost:
        path = corpus / f"{name}.wav"
        if spoilt == "broken":
            path.write_text("no audio")
        elif spoilt == "silent":
            write(path, np.zeros(5 * HOP))
        else:
            write(corpus / "aaa.wav", noise(7, seed=99))
            write(path, noise(7, seed=99))
    other = tmp_path / "other"
    write(other / "x.wav", noise(4, seed=50))
    write(other / "y.wav", noise(4, seed=51))
    (other / "val.txt").touch()
    prepare([corpus, other], tmp_path / "cache", MEL, workers=1)
    cache = TrainingCache(tmp_path / "cache")
    [val] = cache.clips("val")
    assert val.corpus == "voice" and val.id not in lost
    assert len(cache.clips("train")) == len(cache.manifest.clips) - 1 >= N_CLIPS
    # The choice is the same one every time, so nothing is written anew.
    before = content(tmp_path / "cache")
    prepare([corpus, other], tmp_path / "cache", MEL, workers=1)
    assert content(tmp_path / "cache") == before


def test_only_runs_at_full_scale_are_clipped():
    audio = np.zeros(100, np.float32)
    audio[[3, 10, 11]] = 1.0
    assert clipped_share(audio) == 0
    audio[20:24] = -1.0
    audio[98:] = 1.0
    assert clipped_share(audio) == 0.04
    audio[97] = 1.5
    assert clipped_share(audio) == 0.07
    assert clipped_share(audio[:2]) == 0


def test_silence_is_below_60_db():
    tone = np.sqrt(2) * np.sin(2 * np.pi * np.arange(4 * HOP) / 32)
    level = np.repeat([0.0, 0.9e-3, 1.1e-3, 1.0], HOP)
    assert silent_share(tone * level, HOP) == 0.5
    assert silent_share(np.append(tone * level, np.zeros(HOP - 1)), HOP) == 0.5


def test_corpora_of_one_name_are_told_apart(tmp_path, reads):
    for seed, folder in enumerate(("x/wavs", "y/wavs", "voice")):
        write(tmp_path / folder / "a.wav", noise(4, seed))
    folders = [tmp_path / "x/wavs", tmp_path / "y/wavs", tmp_path / "voice"]
    prepare(folders, tmp_path / "cache", MEL, workers=1)
    cached = TrainingCache(tmp_path / "cache").manifest.clips
    assert [clip.corpus for clip in cached] == ["x/wavs", "y/wavs", "voice"]


def test_a_folder_in_another_gives_its_clips_once(corpus, tmp_path, reads):
    report = prepare([corpus.parent, corpus], tmp_path / "cache", MEL, workers=1)
    assert len(reads) == len(report.clips) == N_CLIPS
    assert [clip.reason for clip in report.left_out] == ["duplicate"] * N_CLIPS
    assert prepare([corpus.parent, corpus], tmp_path / "cache", MEL, workers=1).kept == N_CLIPS


# --- speeds ---


@needs_pyworld
def test_recordings_for_training_are_there_at_other_speeds_too(tmp_path: Path) -> None:
    (tmp_path / "tone" / "wavs").mkdir(parents=True)
    phase = 2 * np.pi * 150 / RATE * np.arange(RATE)
    tone = 0.03 * sum(np.sin(k * phase) for k in range(1, 20))
    for name in "ab":
        write(tmp_path / "tone" / "wavs" / f"{name}.wav", tone * (1 if name == "a" else 0.9))
    (tmp_path / "tone" / "metadata.csv").write_text("a|one\nb|two\n")
    (tmp_path / "tone" / "val.txt").write_text("b\n")
    out = tmp_path / "cache"
    prepare([tmp_path / "tone"], out, MEL, workers=1)
    report = prepare([tmp_path / "tone"], out, MEL, workers=1, speeds=[1.25, 0.8])
    assert report.kept == 2  # the recordings as they are were read before
    assert "played at 1.25 times the speed (1 of 4 clips)" in report.notes
    cache = TrainingCache(out)
    clips = {(clip.corpus, clip.id, clip.split): clip for clip in cache.manifest.clips}
    expected = [("tone", "a", "train"), ("tone", "b", "val"), ("tone x1.25", "a", "train")]
    assert list(clips) == [*expected, ("tone x0.8", "a", "train")]
    for (corpus, _, _), clip in clips.items():
        speed = float(corpus.partition("x")[2] or 1)
        assert clip.samples == pytest.approx(RATE / speed, abs=2)
        assert np.median(cache.f0(clip)) == pytest.approx(150 * speed, rel=0.01)


@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        ([3.0], "speed 3: give a number from 0.5 to 2"),
        ([float("nan")], "speed nan: give a number"),
        ([1.0], "not 1, which is there anyway"),
        ([1.1, 1.2, 1.1], "speed 1.1 is given twice"),
    ],
)
def test_a_speed_out_of_range_is_refused(corpus, tmp_path, speeds, message) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare([corpus], tmp_path / "cache", MEL, workers=1, speeds=speeds)
    assert names_in(tmp_path) == ["voice"]


def test_speeds_do_not_go_with_mels(corpus, tmp_path, capsys) -> None:
    command = ["prepare", str(corpus), "-o", str(tmp_path / "cache"), "--speed", "1.1"]
    assert main([*command, "--mels", str(corpus)]) == 2
    assert "have the speed of the recordings" in capsys.readouterr().err


# --- going on ---


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=needs_pyworld)], ids=["one process", "pool"]
)
def test_interrupted_prepare_goes_on(corpus, tmp_path, workers, reads):
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "cache", MEL, interrupt_at(3), workers=workers)
    assert not (tmp_path / "cache").exists()
    # As a process that is killed in the middle of writing leaves it.
    (tmp_path / ".cache.parts" / ".0123456789ab.tmp.npz").write_bytes(b"half")
    reads.clear()
    seen = []
    report = prepare([corpus], tmp_path / "cache", MEL, lambda *done: seen.append(done), workers=1)
    # A pool may have finished more than it had reported.
    assert report.kept == 3 if workers == 1 else 3 <= report.kept <= N_CLIPS
    assert len(reads) == N_CLIPS - report.kept
    assert seen == [(i, N_CLIPS) for i in range(report.kept + 1, N_CLIPS + 1)]
    assert "clips were done before and are kept" in "\n".join(report.lines())
    assert names_in(tmp_path) == ["cache", "voice"]
    TrainingCache(tmp_path / "cache").verify()
    prepare([corpus], tmp_path / "once", MEL, workers=1)
    if workers == 1:
        assert content(tmp_path / "once") == content(tmp_path / "cache")


def test_a_worker_that_is_killed_costs_its_recording_alone(tmp_path):
    paths = [tmp_path / f"clip{i}.wav" for i in range(6)]
    tasks = [ClipTask(path, path.stem, tmp_path, RATE, HOP, None) for path in paths]
    assert len(list(prepare_module._map(killed_by_clip1, tasks, 2))) == 6
    refusals = [read_result(tmp_path, task.key) for task in tasks]
    assert [refusal.reason for refusal in refusals] == ["silent", "unreadable", *["silent"] * 4]
    assert "clip1.wav: the process that read it was killed" in refusals[1].detail


def test_a_rerun_reads_what_has_changed_alone(corpus, tmp_path, reads):
    out = tmp_path / "cache"
    prepare([corpus], out, MEL, workers=1)
    before, inode = content(out), (out / AUDIO_FILE).stat().st_ino
    reads.clear()
    report = prepare([corpus], out, MEL, workers=1)
    assert reads == [] and report.kept == N_CLIPS
    assert content(out) == before and (out / AUDIO_FILE).stat().st_ino == inode

    # The same length, so that only the samples are others.
    write(corpus / "clip2.wav", noise(6, seed=20))
    write(corpus / "new.wav", noise(3, seed=21))
    (corpus / "clip4.wav").unlink()
    report = prepare([corpus], out, MEL, workers=1)
    assert reads == ["clip2.wav", "new.wav"] and report.kept == N_CLIPS - 2
    cache = TrainingCache(out)
    cache.verify()
    for clip in cache.manifest.clips:
        samples, _ = soundfile.read(corpus / f"{clip.id}.wav", dtype="int16")
        np.testing.assert_array_equal(cache.audio(clip), samples)
    assert names_in(tmp_path) == ["cache", "voice"]


def test_a_part_of_another_version_of_a_file_is_not_used(corpus, tmp_path, reads):
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "cache", MEL, interrupt_at(3), workers=1)
    write(corpus / "clip1.wav", noise(5, seed=22))
    reads.clear()
    prepare([corpus], tmp_path / "cache", MEL, workers=1)
    assert reads == ["clip1.wav", "clip3.wav", "clip4.wav", "clip5.wav"]


def test_other_settings_and_force_read_all_again(corpus, tmp_path, reads):
    out = tmp_path / "cache"
    prepare([corpus], out, MEL, workers=1)
    for options in ({"force": True}, {"mel": MEL.model_copy(update={"hop_length": 128})}):
        reads.clear()
        report = prepare([corpus], out, **({"mel": MEL} | options), workers=1)
        assert len(reads) == N_CLIPS and report.kept == 0
    assert TrainingCache(out).hop_length == 128


def test_interrupted_prepare_keeps_the_old_cache(corpus, tmp_path, reads):
    out = tmp_path / "cache"
    prepare([corpus], out, MEL, workers=1)
    before = content(out)
    write(corpus / "clip2.wav", noise(5, seed=20))
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], out, MEL, interrupt_at(N_CLIPS), workers=1)
    assert content(out) == before
    assert prepare([corpus], out, MEL, workers=1).kept == N_CLIPS


def test_a_damaged_cache_is_not_kept(corpus, tmp_path, reads):
    out = tmp_path / "cache"
    prepare([corpus], out, MEL, workers=1)
    before = content(out)
    (out / AUDIO_FILE).write_bytes(before[AUDIO_FILE][:-2] + b"\x12\x34")
    assert prepare([corpus], out, MEL, workers=1).kept == 0
    assert content(out) == before


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 nothing"])
def test_a_damaged_part_is_named(corpus, tmp_path, reads, damage):
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "cache", MEL, interrupt_at(3), workers=1)
    parts = tmp_path / ".cache.parts"
    next(parts.glob("*.npz")).write_bytes(damage)
    with pytest.raises(DataError, match=r"\.cache\.parts is damaged: remove that folder"):
        prepare([corpus], tmp_path / "cache", MEL, workers=1)


@needs_pyworld
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for workers in /proc")
def test_a_killed_prepare_leaves_no_worker_and_goes_on(tmp_path):
    for i in range(60):
        write(tmp_path / "in" / f"{i}.wav", noise(300, seed=i))
    out, parts = tmp_path / "cache", tmp_path / ".cache.parts"
    command = [sys.executable, "-m", "waveflow", "prepare", str(tmp_path / "in")]
    with subprocess.Popen([*command, "-o", str(out), "--workers", "2"]) as process:
        while not list(parts.glob("*.npz")):
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    deadline = time.monotonic() + 30
    while any(Path("/proc", child).is_dir() for child in children):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)
    assert not out.exists()
    report = prepare([tmp_path / "in"], out, MEL, workers=1)
    assert 0 < report.kept < 60 and len(report.clips) == 60
    prepare([tmp_path / "in"], tmp_path / "once", MEL, workers=1)
    assert content(out) == content(tmp_path / "once")


# --- sharing ---


@pytest.mark.parametrize("n", [2, 3, 8])
def test_processes_read_every_clip_once(corpus, tmp_path, reads, n):
    (corpus / "bad.wav").write_text("no audio")
    whole = prepare([corpus], tmp_path / "whole", MEL, workers=1)
    reads.clear()
    out, store = tmp_path / "shared", torch.distributed.HashStore()

    def member(rank: int) -> PrepareReport:
        return prepare([corpus], out, MEL, workers=1, group=Group(rank, n, store))

    with ThreadPoolExecutor(n) as pool:
        assert list(pool.map(member, range(n))) == [whole] * n
    assert sorted(reads) == names_in(corpus)
    assert content(out) == content(tmp_path / "whole")
    assert names_in(tmp_path) == ["shared", "voice", "whole"]


def test_processes_keep_what_one_had_done_in_an_earlier_try(corpus, tmp_path, reads):
    out = tmp_path / "cache"

    def prepare_share(rank: int, progress=None) -> PrepareReport:
        group = Group(rank, 2, store)
        return prepare([corpus], out, MEL, progress, workers=1, group=group)

    store = torch.distributed.HashStore()
    store.set("unpack/done", "")  # by rank 0, which is not here
    with pytest.raises(KeyboardInterrupt):
        prepare_share(1, interrupt_at(N_CLIPS // 2))
    store = torch.distributed.HashStore()
    reads.clear()
    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(prepare_share, range(2))
    assert first.kept == N_CLIPS // 2 and sorted(reads) == [f"clip{i}.wav" for i in (0, 2, 4)]


def test_one_process_unpacks_for_all(corpus, tmp_path, reads, monkeypatch):
    unpacked, store = [], torch.distributed.HashStore()
    extract = archives._extract

    def slow(archive: Path, folder: Path) -> None:
        unpacked.append(archive)
        time.sleep(0.2)
        extract(archive, folder)

    monkeypatch.setattr(archives, "_extract", slow)
    archive = pack(corpus, tmp_path / "voice.zip", "voice")

    def member(rank: int) -> PrepareReport:
        group = Group(rank, 2, store)
        return prepare([archive], tmp_path / "data" / "cache", MEL, workers=1, group=group)

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(member, range(2)))
    assert unpacked == [archive] and reports[0].train.clips == N_CLIPS - 1


# --- archives and the network ---


def pack(folder: Path, archive: Path, root: str) -> Path:
    """An archive of the folder's files below `root` in it."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, Path(root, path.relative_to(folder)))
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:]}") as file:
            file.add(folder, root or ".")
    return archive


@pytest.mark.parametrize("suffix", [".tar.bz2", ".tar.gz", ".zip"])
@pytest.mark.parametrize("root", ["voice", ""])
def test_an_archive_is_a_corpus(corpus, tmp_path, reads, suffix, root):
    archive = pack(corpus, tmp_path / f"voice-1.0{suffix}", root)
    out = tmp_path / "data" / "cache"
    prepare([archive], out, MEL, workers=1)
    cached = TrainingCache(out).manifest.clips
    assert [clip.id for clip in cached] == [f"clip{i}" for i in range(N_CLIPS)]
    assert {clip.corpus for clip in cached} == {"voice-1.0"}
    assert names_in(tmp_path / "data") == ["cache", "voice-1.0"]
    # A rerun neither unpacks nor reads.
    reads.clear()
    assert prepare([archive], out, MEL, workers=1).kept == N_CLIPS
    assert reads == []
    # Another archive of the name would not be what is there.
    write(corpus / "more.wav", noise(5, seed=30))
    pack(corpus, archive, root)
    with pytest.raises(DataError, match="is there already and not from it"):
        prepare([archive], out, MEL, workers=1)


def tar_with(archive: Path, info: tarfile.TarInfo, data: bytes = b"") -> Path:
    with tarfile.open(archive, "w:gz") as file:
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    return archive


def special(kind: bytes, name: str = "voice/a.wav", target: str = "/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (tarfile.TarInfo("/tmp/evil.wav"), "would lie outside"),
        (tarfile.TarInfo("voice/../../evil.wav"), "would lie outside"),
        (tarfile.TarInfo("C:\\evil.wav"), "would lie outside"),
        (special(tarfile.SYMTYPE), "no plain file"),
        (special(tarfile.LNKTYPE), "no plain file"),
        (special(tarfile.FIFOTYPE), "no plain file"),
        (special(tarfile.CHRTYPE), "no plain file"),
    ],
)
def test_unsafe_members_of_a_tar_are_refused(tmp_path, info, message):
    archive = tar_with(tmp_path / "voice.tar.gz", info)
    with pytest.raises(DataError, match=message) as caught:
        unpack(archive, tmp_path)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["voice.tar.gz"]


def test_unsafe_members_of_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("voice/a.wav")
    link.external_attr = 0o120777 << 16
    for name, member in (("a", "../evil.wav"), ("b", "/evil.wav"), ("c", link)):
        archive = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(member, b"/etc/passwd")
        with pytest.raises(DataError, match=r"outside its folder|no plain file"):
            unpack(archive, tmp_path)
    assert names_in(tmp_path) == ["a.zip", "b.zip", "c.zip"]


def test_an_archive_that_grows_too_much_is_refused(tmp_path):
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    (zeros / "a.wav").write_bytes(bytes(4 << 20))
    for suffix in (".tar.bz2", ".zip"):
        archive = pack(zeros, tmp_path / f"bomb{suffix}", "voice")
        with pytest.raises(DataError, match="more than a corpus of its size"):
            unpack(archive, tmp_path)
    assert names_in(tmp_path) == ["bomb.tar.bz2", "bomb.zip", "zeros"]


@pytest.mark.parametrize("suffix", [".tar.bz2", ".tar.gz", ".zip"])
def test_damaged_archives_are_named(corpus, tmp_path, suffix):
    archive = pack(corpus, tmp_path / f"voice-1.0{suffix}", "voice")
    good = archive.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes(b ^ 255 for b in good[middle : middle + 64])
    for bad in (good[:middle], flipped + good[middle + 64 :], b"", b"no archive"):
        archive.write_bytes(bad)
        with pytest.raises(DataError, match=r"voice-1\.0.* is damaged"):
            unpack(archive, tmp_path)
    assert names_in(tmp_path) == ["voice", archive.name]


def test_the_checksum_behind_a_tar_is_read(tmp_path):
    """A changed sample of a recording breaks neither the tar nor the compression."""
    write(tmp_path / "voice" / "a.wav", noise(40, seed=0))
    archive = tmp_path / "voice.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=0) as file:
        file.add(tmp_path / "voice", "voice")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"voice\.tar\.gz is damaged: CRC check failed"):
        unpack(archive, tmp_path / "out")


def test_what_macos_adds_to_an_archive_is_no_folder_of_the_corpus(corpus, tmp_path):
    archive = pack(corpus, tmp_path / "voice-1.0.zip", "voice")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/voice/._clip0.wav", b"no audio")
    folder = unpack(archive, tmp_path)
    assert {"clip0.wav", "clip1.wav"} <= set(names_in(folder))


def test_files_that_are_no_archives_are_refused(corpus, tmp_path):
    with pytest.raises(DataError, match=r"clip0\.wav is neither a folder nor one of"):
        prepare([corpus / "clip0.wav"], tmp_path / "cache", MEL, workers=1)


def stand_in(monkeypatch: pytest.MonkeyPatch, behaviour) -> None:
    """Puts a torchaudio.datasets in place whose LJSPEECH does `behaviour(root)`."""
    package, datasets = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.datasets")
    datasets.LJSPEECH = lambda root, download: behaviour(Path(root)) if download else None
    monkeypatch.setitem(sys.modules, "torchaudio", package)
    monkeypatch.setitem(sys.modules, "torchaudio.datasets", datasets)


def test_download(tmp_path, monkeypatch, capsys):
    roots = []

    def behaviour(root: Path) -> None:
        roots.append(root)
        (root / "LJSpeech-1.1.tar.bz2").write_bytes(b"the archive, which is not kept")
        for i in range(2):
            write(root / "LJSpeech-1.1" / "wavs" / f"LJ00{i}.wav", noise(4, seed=i))
        (root / "LJSpeech-1.1" / "metadata.csv").write_text("LJ000|a|a\nLJ001|b|b\n")

    stand_in(monkeypatch, behaviour)
    monkeypatch.setattr(
        clips_module, "track_f0", lambda audio, rate, hop: np.zeros(len(audio) // hop, np.float32)
    )
    out = tmp_path / "data" / "lj"
    for _ in range(2):
        assert main(["prepare", "--download", "-o", str(out), "--workers", "1"]) == 0
    assert "1 clips (0.00 hours) for training, 1 (0.00" in capsys.readouterr().out
    assert len(roots) == 1
    assert names_in(out.parent) == ["LJSpeech-1.1", "lj"]


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_download_that_fails(tmp_path, monkeypatch, error):
    def behaviour(root: Path) -> None:
        (root / "LJSpeech-1.1").mkdir()
        raise error("first line\nsecond line")

    stand_in(monkeypatch, behaviour)
    with pytest.raises(ConfigError, match=r"first line.*give that file as the corpus") as caught:
        download_ljspeech(tmp_path)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_download_without_torchaudio(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert main(["prepare", "--download", "-o", str(tmp_path / "lj")]) == 2
    message = capsys.readouterr().err
    assert "install the torchaudio" in message and message.count("\n") == 1


def test_nothing_to_prepare(tmp_path, capsys):
    assert main(["prepare", "-o", str(tmp_path / "cache")]) == 2
    assert "name a CORPUS, or give --download" in capsys.readouterr().err


# --- other rates ---


@needs_pyworld
@pytest.mark.parametrize(
    ("rate", "hop", "n_mels", "f_max"), [(16000, 200, 40, 7600), (24000, 300, 100, 12000)]
)
def test_other_rates_from_recordings_to_speech(tmp_path, capsys, rate, hop, n_mels, f_max):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
        [mel]
        sample_rate = {rate}
        n_fft = {4 * hop}
        win_length = {4 * hop}
        hop_length = {hop}
        n_mels = {n_mels}
        f_max = {f_max}
        [model]
        type = "frameglow"
        n_levels = 2
        n_flows = 1
        hidden_channels = 8
        dilations = [1]
        encoder_channels = 8
        encoder_layers = 1
        [train]
        steps = 4
        batch_size = 2
        segment_frames = 16
        energy_weight = 1.0
        calibration_weight = 1.0
        pitch_steps = 2
        validate_every = 4
    """)
    for seed, source_rate in enumerate((rate, 44100, 48000)):
        write(tmp_path / "in" / f"{seed}.wav", make_voice(0.5, seed, source_rate), source_rate)
    cache, run = tmp_path / "cache", tmp_path / "run"
    prepared = ["prepare", str(tmp_path / "in"), "-o", str(cache), "--mel", str(recipe)]
    assert main([*prepared, "--workers", "1"]) == 0
    for clip in TrainingCache(cache).manifest.clips:
        assert clip.samples == pytest.approx(rate / 2, abs=1)
        # A voice of 120 to 180 Hz with 20 Hz to either side.
        track = TrainingCache(cache).f0(clip)
        assert 100 < np.median(track[track > 0]) < 200
    assert main(["train", str(recipe), "--data", str(cache), "--out", str(run)]) == 0
    spoken = tmp_path / "out.wav"
    arguments = ["resynth", str(tmp_path / "in" / "1.wav"), "-o", str(spoken)]
    assert main([*arguments, "--model", str(run)]) == 0, capsys.readouterr().err
    audio, written = soundfile.read(spoken)
    assert written == rate
    assert len(audio) == pytest.approx(rate / 2, abs=hop)
    assert np.isfinite(audio).all() and audio.std() > 0


def test_mel_is_a_preset_or_a_recipe(corpus, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('mel = "mine"')
    for mel, message in (("klatt", "neither one of nvidia, hifigan"), (str(recipe), "recipe")):
        arguments = ["prepare", str(corpus), "-o", str(tmp_path / "cache"), "--mel", mel]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_report_file_is_plain_json(corpus, tmp_path, reads):
    prepare([corpus], tmp_path / "cache", MEL, workers=1)
    report = json.loads((tmp_path / "cache" / "report.json").read_text())
    assert report["kind"] == "waveflow prepare report"
    assert len(report["clips"]) == N_CLIPS
