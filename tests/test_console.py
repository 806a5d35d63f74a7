"""What is printed, and where: streams that are closed, full or left; control characters; disks."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import largest_file

from waveflow.audio.io import write_audio, write_mel
from waveflow.cli.console import note, printable, show_table
from waveflow.cli.main import main
from waveflow.errors import AudioError, MelMismatchError
from waveflow.files import FULL, atomic_path, reason_of

needs_shell = pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
EXAMPLE = Path(__file__).parent.parent / "pretrained" / "frameglow-cc0" / "example.npy"


def shell(command: str, folder: Path) -> tuple[int, str, str]:
    """The status of the first command of a pipe, and what reached stdout and stderr."""
    code = f'"{sys.executable}" -m waveflow'
    script = f"{command.replace('waveflow', code)}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, cwd=folder, text=True)
    return run.returncode, run.stdout, run.stderr


@needs_shell
@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("waveflow info | true", 0, ""),
        ("waveflow --help | true", 0, ""),
        ("waveflow info >&-", 0, ""),
        ("waveflow info > /dev/full", 2, "No space left on device"),
        ("waveflow --help > /dev/full", 2, "No space left on device"),
        ("waveflow vocode none.npy -o out.wav 2>&-", 2, ""),
        ("waveflow vocode none.npy -o out.wav 2>/dev/full", 2, ""),
        ("waveflow vocode none.npy -o out.wav 2>&1 | true", 2, ""),
        ("waveflow vocode - -o out.wav <&-", 2, "- stands for stdin here, which is closed"),
        ("waveflow --debug vocode none.npy -o out.wav 2>&-", 2, ""),
    ],
)
def test_streams_that_cannot_be_written(
    tmp_path: Path, command: str, status: int, words: str
) -> None:
    ended, out, err = shell(command, tmp_path)
    assert ended == status
    assert words in err and (words or not err)
    assert len(err.splitlines()) == bool(words)
    if "--help" not in command and "info" not in command:
        assert not out


@needs_shell
def test_notes_never_enter_the_audio_on_stdout(tmp_path: Path) -> None:
    """A mel that is too loud brings a note on clipping; without stderr it is lost."""
    np.save(tmp_path / "mel.npy", np.load(EXAMPLE)[:, 60:80] + 3)
    command = "waveflow vocode mel.npy -o - --refine 0 2>&- > audio.raw"
    assert shell(command, tmp_path) == (0, "", "")
    audio = (tmp_path / "audio.raw").read_bytes()
    assert len(audio) == 2 * 20 * 256
    assert b"waveflow" not in audio
    # It is there to be said: samples stand at full scale.
    assert np.abs(np.frombuffer(audio, "<i2").astype(int)).max() >= 32767


@pytest.mark.parametrize("error", [SystemExit(3), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_no_result_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A pipe that breaks elsewhere than on stdout, or an exit from below."""

    def broken(*args: object) -> None:
        raise error

    monkeypatch.setattr("waveflow.audio.io.write_mel", broken)
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(2205)), 22050)
    status = main(["mel", str(tmp_path / "a.wav"), "-o", str(tmp_path / "a.npy")])
    assert status == (3 if isinstance(error, SystemExit) else 1)


HOSTILE = "a\x1b[31mred\x07\r\x9bb\u202ec\udce9\x00d"


@pytest.mark.parametrize(
    "call",
    [
        lambda: note(HOSTILE),
        lambda: show_table([[HOSTILE, "x"]]),
        lambda: main(["vocode", HOSTILE.replace("\0", ""), "-o", "out.wav"]),
        lambda: main(["info", HOSTILE.replace("\0", "")]),
        lambda: main(["vocode", str(EXAMPLE), "-o", "out.wav", "--device", HOSTILE]),
        lambda: main(["vocode", str(EXAMPLE), "-o", "out.wav", "--precision", HOSTILE]),
        lambda: main([HOSTILE]),
    ],
    ids=["note", "table", "file", "model", "device", "choice", "verb"],
)
def test_control_characters_are_escaped(
    call: Callable[[], Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    call()
    printed = "".join(capsys.readouterr())
    assert "\\x1b[31mred\\x07" in printed
    assert printable(printed.replace("\n", "")) == printed.replace("\n", "")


def test_printable_text_stays() -> None:
    assert printable("Grüße, 音声 ~ \\ 'x'") == "Grüße, 音声 ~ \\ 'x'"


AUDIO, MEL = np.zeros(100_000), np.zeros((80, 2000))
WRITERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "out.wav": (lambda path: write_audio(path, AUDIO, 22050), AudioError),
    "out.flac": (lambda path: write_audio(path, np.random.rand(100_000), 22050), AudioError),
    "out.npy": (lambda path: write_mel(path, MEL), MelMismatchError),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_whatever_the_library_says(tmp_path: Path, name: str) -> None:
    write, kind = WRITERS[name]
    with largest_file(20_000), pytest.raises(kind) as caught:
        write(tmp_path / name)
    assert str(caught.value) == f"cannot write {tmp_path / name}: {os.strerror(errno.EFBIG)}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: soundfile.write(path, AUDIO, 22050, format="WAV"),
        lambda path: np.save(path.open("wb"), MEL),
        lambda path: torch.save(torch.zeros(100_000), path),
        lambda path: path.write_bytes(bytes(100_000)),
    ],
    ids=["soundfile", "numpy", "torch", "python"],
)
def test_every_librarys_failure_becomes_the_systems_reason(
    tmp_path: Path, write: Callable[[Path], Any]
) -> None:
    with (
        largest_file(20_000),
        pytest.raises(OSError) as caught,
        atomic_path(tmp_path / "x") as path,
    ):
        write(path)
    assert caught.value.errno in FULL
    assert caught.value.filename == str(tmp_path / "x")


def test_other_failures_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_path(tmp_path / "x"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_the_full_disk_has_a_name(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    disk = tmp_path
    while not os.path.ismount(disk):
        disk = disk.parent
    assert reason_of(full, tmp_path / "x.wav") == (
        f"No space left on device (the disk at {disk} is full)"
    )
    assert reason_of(OSError(errno.EACCES, "Permission denied"), tmp_path) == "Permission denied"
