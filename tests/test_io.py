"""Audio and mel files: exact round trips, atomic writes, and one clear error for each bad file."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waveflow.audio.io import (
    find_files,
    read_audio,
    read_mel,
    to_int16,
    write_audio,
    write_mel,
)
from waveflow.errors import AudioError, DataError, MelMismatchError, WaveflowError
from waveflow.files import AUDIO_SUFFIXES, atomic_path


def random_int16(n: int) -> np.ndarray:
    samples = np.random.default_rng(0).integers(-32768, 32768, n).astype(np.int16)
    samples[:2] = -32768, 32767
    return samples


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
def test_a_16_bit_file_survives_bit_for_bit(tmp_path, suffix):
    samples = random_int16(5000)
    soundfile.write(tmp_path / "in.wav", samples, 22050, "PCM_16")
    audio, rate, notes = read_audio(tmp_path / "in.wav", 22050)
    assert (audio.dtype, audio.shape, rate, notes) == (np.float32, (5000,), 22050, [])
    write_audio(tmp_path / f"out{suffix}", audio, rate)
    again, rate = soundfile.read(tmp_path / f"out{suffix}", dtype="int16")
    assert rate == 22050
    np.testing.assert_array_equal(again, samples)
    np.testing.assert_array_equal(to_int16(audio), samples)


def test_float_files_are_exact_and_integers_saturate(tmp_path):
    audio = np.array([0.1, -0.2, 1.0, -1.0, 1.5, -3.0, 1e-9, 0.0], dtype=np.float32)
    write_audio(tmp_path / "a.wav", audio, 16000, float32=True)
    again, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_array_equal(again, audio)
    assert soundfile.info(tmp_path / "a.wav").subtype == "FLOAT"
    write_audio(tmp_path / "b.wav", audio, 16000)
    again, _ = soundfile.read(tmp_path / "b.wav", dtype="int16")
    assert again.tolist() == [3277, -6554, 32767, -32768, 32767, -32768, 0, 0]


def test_stereo_and_other_rates_are_changed_and_said(tmp_path):
    time = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "s.wav", np.stack([0.5 * tone, 0.1 * tone], 1), 16000, "FLOAT")
    audio, rate, notes = read_audio(tmp_path / "s.wav", 22050)
    assert (rate, audio.shape, audio.dtype) == (22050, (22050,), np.float32)
    assert notes == ["2 channels mixed down to one", "resampled from 16000 Hz to 22050 Hz"]
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    np.testing.assert_allclose(audio[500:-500], expected[500:-500], atol=1e-4)
    audio, rate, notes = read_audio(tmp_path / "s.wav")
    assert (rate, audio.shape, len(notes)) == (16000, (16000,), 1)


def bad_audio_files(folder):
    (folder / "folder.wav").mkdir()
    (folder / "text.wav").write_text("not audio")
    (folder / "nothing.wav").touch()
    (folder / "raw.raw").write_bytes(bytes(100))
    soundfile.write(folder / "empty.wav", np.zeros(0), 22050)
    soundfile.write(folder / "one.wav", np.zeros(1), 22050)
    nan = np.zeros(100, dtype=np.float32)
    nan[7] = np.nan
    soundfile.write(folder / "nan.wav", nan, 22050, "FLOAT")
    nan[7] = np.inf
    soundfile.write(folder / "inf.wav", nan, 22050, "FLOAT")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.wav", "does not exist"),
        ("folder.wav", "is a folder"),
        ("text.wav", "not an audio file"),
        ("nothing.wav", "not an audio file"),
        ("raw.raw", "not an audio file"),
        ("empty.wav", "0 samples"),
        ("one.wav", "too short"),
        ("nan.wav", "NaN or infinite"),
        ("inf.wav", "NaN or infinite"),
    ],
)
@pytest.mark.parametrize("rate", [None, 16000])
def test_bad_audio_is_named(tmp_path, name, words, rate):
    bad_audio_files(tmp_path)
    with pytest.raises(AudioError, match=words) as caught:
        read_audio(tmp_path / name, rate)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["out.wav", "out.flac"])
@pytest.mark.parametrize("n_lost", [100, 6000])
def test_an_end_that_a_library_loses_is_an_error(tmp_path, monkeypatch, name, n_lost):
    """As libsndfile loses the end of a FLAC when the disk is full as it closes."""
    close = soundfile.SoundFile.close

    def losing(file):
        writes = file.mode == "w" and not file.closed
        close(file)
        if writes:
            os.truncate(file.name, os.path.getsize(file.name) - n_lost)

    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(soundfile.SoundFile, "close", losing)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 10_000)
    with pytest.raises(AudioError, match=f"cannot write .*{name}: its end was not written"):
        write_audio(tmp_path / name, noise, 22050)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


def test_bad_writes_are_named_and_leave_nothing(tmp_path):
    audio = np.zeros(10, dtype=np.float32)
    (tmp_path / "file").touch()
    cases = [
        ("a.mp3", audio, {}, ".wav or .flac"),
        ("a", audio, {}, ".wav or .flac"),
        ("a.flac", audio, {"float32": True}, "32-bit floats"),
        ("missing/a.wav", audio, {}, "no folder"),
        ("file/a.wav", audio, {}, "no folder"),
        ("a.wav", audio[None], {}, "shape"),
        ("a.wav", audio[:0], {}, "shape"),
        ("a.wav", audio * np.nan, {}, "NaN"),
    ]
    for name, samples, options, words in cases:
        with pytest.raises(AudioError, match=words):
            write_audio(tmp_path / name, samples, 22050, **options)
    with pytest.raises(AudioError, match="cannot write"):
        write_audio(tmp_path / "a.wav", audio, -1)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(AudioError, match="cannot write"):
            write_audio(tmp_path / "a.wav", np.zeros(10), 22050)
        with pytest.raises(MelMismatchError, match="cannot write"):
            write_mel(tmp_path / "a.npy", np.zeros((2, 3)))
    finally:
        tmp_path.chmod(0o700)


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_mel_files(tmp_path):
    mel = np.random.default_rng(1).normal(size=(80, 7)).astype(np.float32)
    write_mel(tmp_path / "a.npy", mel)
    np.save(tmp_path / "b.npy", mel[None].astype(np.float64))
    np.savez(tmp_path / "c.npz", anything=mel)
    np.savez(tmp_path / "d.npz", mel=mel, other=np.zeros(3))
    torch.save(torch.from_numpy(mel), tmp_path / "e.pt")
    torch.save(torch.nn.Parameter(torch.from_numpy(mel)[None]), tmp_path / "f.pt")
    np.save(tmp_path / "g.npy", np.asfortranarray(mel))
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 7
    for name in names:
        read = read_mel(tmp_path / name)
        assert read.dtype == np.float32 and read.flags.c_contiguous
        np.testing.assert_array_equal(read, mel, err_msg=name)
    torch.save(torch.from_numpy(mel).bfloat16(), tmp_path / "h.pt")
    np.testing.assert_allclose(read_mel(tmp_path / "h.pt"), mel, rtol=2**-8)


class Trap:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("name", ["trap.npy", "trap.npz", "trap.pt"])
def test_nothing_in_a_mel_file_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    trap = np.array([Trap()], dtype=object)
    if name.endswith(".pt"):
        torch.save(Trap(), name)
    elif name.endswith(".npz"):
        np.savez(name, mel=trap)
    else:
        np.save(name, trap)
    with pytest.raises(MelMismatchError, match="damaged or not a"):
        read_mel(name)
    assert os.listdir(tmp_path) == [name]


def test_bad_mels_are_named(tmp_path):
    mel = np.zeros((4, 5))
    arrays = {
        "nan": (np.where(np.eye(4, 5), np.nan, mel), "NaN"),
        "inf": (np.where(np.eye(4, 5), np.inf, mel), "NaN or infinite"),
        "one": (mel[0], r"\(5,\)"),
        "batch": (np.zeros((2, 4, 5)), r"\(2, 4, 5\)"),
        "empty": (mel[:, :0], "empty"),
        "complex": (mel + 1j, "complex128"),
        "text": (np.array([["a"]]), "not real"),
    }
    for name, (array, words) in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(MelMismatchError, match=words):
            read_mel(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "two.npz", a=mel, b=mel)
    torch.save({"a": torch.zeros(4, 5), "b": torch.zeros(4, 5)}, tmp_path / "dict.pt")
    torch.save([torch.zeros(4, 5)], tmp_path / "list.pt")
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "zero.npy").touch()
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "mel.csv").write_text("1,2")
    for name, words in {
        "two.npz": "a, b",
        "dict.pt": "holds the arrays a, b; keep one",
        "list.pt": "holds a list; expected one plain tensor",
        "text.npy": "damaged or not",
        "text.npz": "damaged or not",
        "text.pt": "damaged or not",
        "zero.npy": "damaged or not",
        "folder.npy": "is a folder",
        "missing.npy": "does not exist",
        "mel.csv": "must end in",
    }.items():
        with pytest.raises(MelMismatchError, match=words) as caught:
            read_mel(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    for name in ("mel.txt", "missing/mel.npy", "folder.npy"):
        with pytest.raises(MelMismatchError, match="cannot write"):
            write_mel(tmp_path / name, mel)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(position=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 2000))
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.pt", "a.wav", "a.flac"])
def test_damaged_files_give_values_or_one_line(tmp_path_factory, name, position, value, cut):
    path = tmp_path_factory.mktemp("damaged") / name
    mel = np.linspace(-11, 1, 80 * 6, dtype=np.float32).reshape(80, 6)
    if name.endswith(".npy"):
        write_mel(path, mel)
    elif name.endswith(".npz"):
        np.savez_compressed(path, mel=mel)
    elif name.endswith(".pt"):
        torch.save(torch.from_numpy(mel), path)
    else:
        write_audio(path, mel.ravel() / 20, 22050)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    del content[len(content) - cut % len(content) :]
    path.write_bytes(content)
    try:
        array = read_audio(path)[0] if name in ("a.wav", "a.flac") else read_mel(path)
    except WaveflowError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(array).all()


def test_the_files_of_a_folder(tmp_path):
    """With sub-folders and in any case; what is no input is counted and named."""
    names = ("b.wav", "a.FLAC", "c.txt", "d.m4a", "e.m4a", ".f.tmp.wav", "sub/deep/g.caf", "plain")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for hidden in ("folder.wav", ".hidden", "out"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "h.wav").touch()
    (tmp_path / "broken.wav").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "i.au").symlink_to(tmp_path / "b.wav")
    names, left_out = find_files(tmp_path, AUDIO_SUFFIXES, without=str(tmp_path / "out"))
    assert names == ["a.FLAC", "b.wav", "folder.wav/h.wav", "i.au", "sub/deep/g.caf"]
    assert [line.split(" (")[0] for line in left_out] == [
        "broken.wav", "d.m4a", "e.m4a", "linked",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no \.npy file"):
        find_files(tmp_path, (".npy",))
    with pytest.raises(DataError, match="not a folder"):
        find_files(tmp_path / "c.txt", (".npy",))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".NPZ"])
def test_every_kind_of_mel_is_written_and_read(tmp_path, suffix):
    mel = np.random.default_rng(0).standard_normal((80, 7)).astype(np.float32)
    write_mel(tmp_path / f"mel{suffix}", mel)
    assert np.array_equal(read_mel(tmp_path / f"mel{suffix}"), mel)


def test_importing_io_is_light():
    code = "import sys, waveflow.audio.io; print({'torch', 'librosa', 'soxr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
