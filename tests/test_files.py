"""Whole files, locks that name their holder, and outputs that are links, pipes and devices."""

import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import make_voice
from tiny_training import recipe, write_cache

from waveflow.audio.io import write_audio, write_mel
from waveflow.cli.main import main
from waveflow.data.archives import unpack
from waveflow.errors import AudioError, ConfigError, MelMismatchError
from waveflow.files import atomic_path, lock, output_path, temporary_folder

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has neither flock nor SIGKILL")


@contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """Runs code that prints a word when it has what it wants, and then waits to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time\nfrom pathlib import Path\n{code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.communicate()


WAIT = "print('here', flush=True); time.sleep(600)"


def hold(path: Path) -> str:
    return f"from waveflow.files import lock\nwith lock(Path({str(path)!r}), 'x'): {WAIT}"


# --- locks ---


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], list[str]]:
    """Command lines by name, that write into a folder."""
    data = tmp_path_factory.mktemp("data")
    cache = write_cache(data / "cache", ["train", "val"])
    (data / "recipe.json").write_text(recipe(steps=1, pitch_steps=0).model_dump_json())
    corpus = data / "corpus"
    corpus.mkdir()
    for name in "ab":
        soundfile.write(corpus / f"{name}.wav", make_voice(0.5, ord(name) % 2), 22050)
    with zipfile.ZipFile(data / "corpus.zip", "w") as archive:
        for file in corpus.iterdir():
            archive.write(file, f"corpus/{file.name}")

    def arguments(verb: str, folder: Path) -> list[str]:
        train = ["train", str(data / "recipe.json"), "-o", str(folder / "run"), "--data"]
        prepare = ["-o", str(folder / "cache"), "--workers", "1"]
        return {
            "train": [*train, str(cache.folder)],
            "resume": [*train, str(cache.folder), "--resume"],
            "prepare": ["prepare", str(corpus), *prepare],
            "unpack": ["prepare", str(data / "corpus.zip"), *prepare],
        }[verb]

    return arguments


@pytest.mark.parametrize(
    ("verb", "file"),
    [
        ("train", "run/.lock"),
        ("resume", "run/.lock"),
        ("prepare", ".cache.lock"),
        ("unpack", ".cache.lock"),
        ("unpack", ".corpus.lock"),
    ],
)
def test_a_lock_names_its_holder_and_dies_with_it(
    verbs: Callable[[str, Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    file: str,
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    arguments = verbs(verb, tmp_path)
    with another_process(hold(path)) as process:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"in use by process {process.pid} on {socket.gethostname()} since 2" in said
        if file != ".corpus.lock":
            assert sorted(tmp_path.rglob("*")) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.is_file()
    assert main(arguments) == 0, capsys.readouterr().err
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".waveflow-archive"]


def test_a_lock_that_says_something_else_is_not_repeated(tmp_path: Path) -> None:
    """Whoever shares the folder may write into it."""
    path = tmp_path / ".lock"
    with another_process(hold(path)):
        for words in (
            "\x1b]0;evil\x07",
            "process 1 on \x1b[2J since 2026-01-01 00:00:00",
            "x" * 900,
        ):
            path.write_text(words)
            with pytest.raises(ConfigError, match="in use by another process:"), lock(path, "x"):
                pass


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("dear")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="cannot lock"), lock(tmp_path / ".lock", "x"):
        pass
    assert victim.read_text() == "dear"


def test_a_lock_within_itself_does_nothing(tmp_path: Path) -> None:
    with lock(tmp_path / "l", "x"), lock(tmp_path / "l", "x"):
        assert (tmp_path / "l").is_file()
    assert not list(tmp_path.iterdir())


# --- temporary files of killed processes ---

KILLED = {
    "a file": (
        "from waveflow.files import atomic_path\n"
        "with atomic_path(FOLDER / 'out.wav') as t: t.write_bytes(b'half'); ",
        lambda folder: write_audio(folder / "out.wav", make_voice(0.1), 22050),
    ),
    "a mel": (
        "from waveflow.files import output_path\n"
        "with output_path(FOLDER / 'out.npy') as t: t.write_bytes(b'half'); ",
        lambda folder: write_mel(folder / "out.npy", np.zeros((4, 4))),
    ),
    "a folder": (
        "from waveflow.files import temporary_folder\n"
        "with temporary_folder(FOLDER / 'out') as t: (t / 'a' / 'b').mkdir(parents=True); ",
        lambda folder: make_folder(folder / "out"),
    ),
    "an archive": (
        "from waveflow.data import archives\n"
        "def make(scratch): (scratch / 'half.wav').touch(); " + WAIT + "\n"
        "archives._make_once(FOLDER / 'big', make)\n",
        lambda folder: unpack(folder / "big.zip", folder),
    ),
}


def make_folder(path: Path) -> None:
    with temporary_folder(path) as temporary:
        assert not list(temporary.iterdir())
        (temporary / "x").touch()
        temporary.rename(path)


@pytest.mark.parametrize("what", KILLED)
def test_what_a_kill_leaves_the_next_one_removes(tmp_path: Path, what: str) -> None:
    code, again = KILLED[what]
    with zipfile.ZipFile(tmp_path / "big.zip", "w") as archive:
        archive.writestr("big/a.wav", b"x")
    code = code.replace("FOLDER", f"Path({str(tmp_path)!r})")
    with another_process(code if what == "an archive" else code + WAIT) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.glob(".*"))
    again(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_kill_when_an_archive_is_just_unpacked(tmp_path: Path) -> None:
    """The corpus is whole. While its maker tidies up it can be used, and a later call tidies up."""
    with zipfile.ZipFile(tmp_path / "big.zip", "w") as archive:
        archive.writestr("big/a.wav", b"x")
    code = (
        "import shutil\nfrom waveflow.data.archives import unpack\n"
        f"def rmtree(*args, **kwargs): {WAIT}\n"
        "shutil.rmtree = rmtree\n"
        f"unpack(Path({str(tmp_path / 'big.zip')!r}), Path({str(tmp_path)!r}))\n"
    )
    with another_process(code) as process:
        unpack(tmp_path / "big.zip", tmp_path)
        assert len(list(tmp_path.glob(".big.*"))) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert unpack(tmp_path / "big.zip", tmp_path) == tmp_path / "big"
    assert sorted(os.listdir(tmp_path)) == ["big", "big.zip"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """A second process gets another name, and what it leaves is not in the first one's way."""
    path = tmp_path / "a.txt"
    code = f"from waveflow.files import atomic_path\nwith atomic_path({str(path)!r}) as t: {WAIT}"
    with another_process(code):
        [other] = tmp_path.glob(".*")
        with atomic_path(path) as temporary:
            assert temporary != other
            temporary.write_text("mine")
        assert path.read_text() == "mine" and other.exists()


def test_threads_that_write_one_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", [str(k) * 50_000 for k in range(8)]

    def write(text: str) -> None:
        for _ in range(10):
            with atomic_path(path) as temporary:
                temporary.write_text(text)

    threads = [threading.Thread(target=write, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("planted", ["link", "folder", "pipe"])
def test_a_planted_temporary_name_is_left_alone(tmp_path: Path, planted: str) -> None:
    path, victim = tmp_path / "a.txt", tmp_path / "victim"
    victim.write_text("dear")
    with atomic_path(path) as name:
        name.write_text("old")
    {
        "link": lambda: name.symlink_to(victim),
        "folder": name.mkdir,
        "pipe": lambda: os.mkfifo(name),
    }[planted]()
    with atomic_path(path) as temporary:
        assert temporary != name
        temporary.write_text("new")
    assert (path.read_text(), victim.read_text()) == ("new", "dear")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".txt")
    with atomic_path(path) as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == [path.name]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path / "b") as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


# --- outputs that are no plain files ---


@pytest.mark.parametrize("to", ["file", "missing", "other suffix", "link", "other folder"])
def test_an_output_that_is_a_link_stays_one(tmp_path: Path, to: str) -> None:
    target = tmp_path / ("data.bin" if to == "other suffix" else "data.npy")
    if to == "other folder":
        target = tmp_path / "far" / "data.npy"
        target.parent.mkdir()
    if to != "missing":
        target.write_bytes(b"old")
    out = tmp_path / "out.npy"
    if to == "link":
        (tmp_path / "between").symlink_to(target)
        out.symlink_to(tmp_path / "between")
    else:
        out.symlink_to(os.path.relpath(target, tmp_path))
    write_mel(out, np.ones((2, 3)))
    assert out.is_symlink() and not target.is_symlink()
    assert np.load(target).shape == (2, 3)
    assert not list(tmp_path.rglob(".*"))


def test_a_link_that_leads_nowhere_is_one_error(tmp_path: Path) -> None:
    loop, astray = tmp_path / "loop.wav", tmp_path / "astray.wav"
    loop.symlink_to(loop)
    astray.symlink_to(tmp_path / "no" / "x.wav")
    for path in (loop, astray):
        with pytest.raises(AudioError, match="cannot write") as caught:
            write_audio(path, make_voice(0.1), 22050)
        assert "\n" not in str(caught.value)
        assert path.is_symlink()


def test_a_pipe_gets_the_bytes(tmp_path: Path, tiny_model: Path) -> None:
    """By the command line: the reader gets what a file would hold."""
    mel, pipe, plain = tmp_path / "mel.npy", tmp_path / "out.wav", tmp_path / "plain.wav"
    np.save(mel, np.full((80, 200), -5.0, np.float32))
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    for out in (pipe, plain):
        assert main(["vocode", str(mel), "-o", str(out), "--model", str(tiny_model)]) == 0
    reader.join(10)
    assert got == [plain.read_bytes()] and len(got[0]) > 2**16  # more than a pipe holds
    assert pipe.is_fifo()


def test_a_device_gets_the_bytes_or_is_refused(tmp_path: Path) -> None:
    for name, device in (("null.npy", "/dev/null"), ("full.npy", "/dev/full")):
        (tmp_path / name).symlink_to(device)
    write_mel(tmp_path / "null.npy", np.ones((2, 3)))
    with pytest.raises(MelMismatchError, match=r"cannot write .*full.npy: No space left"):
        write_mel(tmp_path / "full.npy", np.ones((2, 3)))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.npy"))
        with pytest.raises(MelMismatchError, match="neither a file nor a pipe"):
            write_mel(tmp_path / "socket.npy", np.ones((2, 3)))
    with pytest.raises(OSError), output_path(tmp_path):
        pass


def test_a_link_to_an_input_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be written through."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir(), out.mkdir()
    for name in "ab":
        soundfile.write(source / f"{name}.wav", make_voice(0.2), 22050)
    before = (source / "b.wav").read_bytes()
    (out / "a.wav").symlink_to(source / "b.wav")
    for arguments in (
        [str(source), "-o", str(out), "--force"],
        [str(source / "b.wav"), "-o", str(out / "a.wav")],
    ):
        assert main(["resynth", *arguments, "--model", str(tiny_model)]) == 2
        assert "is also an input" in capsys.readouterr().err
    assert (source / "b.wav").read_bytes() == before
