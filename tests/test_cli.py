"""The command line: every verb, option and error, in process; a few as a process of its own."""

import io
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
import typer
from conftest import N_MELS, SAMPLE_RATE, make_voice
from forking import Forked, Outcome, command

from waveflow import __version__
from waveflow.audio import io as audio_io
from waveflow.audio.mel import MEL_PRESETS, MelSpectrogram
from waveflow.cli import console
from waveflow.cli.main import app, main
from waveflow.engine.cost import count_parameters, macs_per_second, measure_speed
from waveflow.engine.options import SynthesisOptions
from waveflow.engine.vocoder import Vocoder, load
from waveflow.metrics.copies import evaluate as measure_copies

VERBS = (
    "vocode",
    "resynth",
    "say",
    "serve",
    "mel",
    "convert-mel",
    "doctor",
    "denoise",
    "prepare",
    "train",
    "compare",
    "evaluate",
    "bench",
    "info",
    "convert",
    "export",
)
HOP = 256


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line in process."""

    def call(*args: str | Path) -> Result:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture(autouse=True)
def _threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    """A recording whose length is no multiple of the hop."""
    return write_wav(tmp_path / "in.wav", make_voice(0.5))


@pytest.fixture
def mel_file(tmp_path: Path) -> Path:
    path = tmp_path / "mel.npy"
    np.save(path, voice_mel())
    return path


def write_wav(path: Path, audio: np.ndarray, rate: int = SAMPLE_RATE, subtype="PCM_16") -> Path:
    soundfile.write(path, audio, rate, subtype)
    return path


def voice_mel(seconds: float = 0.4, seed: int = 0) -> np.ndarray:
    audio = torch.from_numpy(make_voice(seconds, seed))
    return MelSpectrogram(MEL_PRESETS["hifigan"])(audio).numpy()


def samples(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def assert_one_line(result: Result, *words: str, status: int = 2) -> None:
    """An error as the command line promises it: one line on stderr, nothing on stdout."""
    assert result.status == status, result
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("waveflow: ")
    for word in words:
        assert word in result.err


# Help and version


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_80_columns_and_has_examples(
    run: Run, verb: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(verb, "--help")
    assert result.status == 0 and result.err == ""
    assert "Examples" in result.out
    assert max(map(len, result.out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_the_help_parse(run: Run, verb: str):
    text = run(verb, "--help").out.replace("\\\n", " ")
    examples = [line.split() for line in text.splitlines() if f"  waveflow {verb}" in line]
    assert examples
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    for _, _, *args in examples:
        command.make_context(verb, shlex.split(" ".join(args)))


def test_without_a_verb_the_help_lists_all_verbs(run: Run):
    result = run()
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= 80
    for verb in VERBS:
        assert f"\n  {verb} " in result.out


def test_version(run: Run):
    assert run("--version") == Result(0, f"waveflow {__version__}\n", "")


QUICK = """
import sys
from waveflow.cli.main import main

def check(expected, *args):
    assert main(args) == expected, args
    assert "torch" not in sys.modules, args

verbs = sys.argv[1:]
for verb in verbs:
    check(0, verb, "--help")
assert not {"numpy", "soundfile"} & set(sys.modules)
check(0, "info")
check(2, "info", "no-such-model")
check(2, "vocode", "no.npy", "-o", "out.wav")
check(2, "resynth", "in.wav", "-o", "out.mp3")
for options in (
    ["--model", "no-such-model"], ["--sigma", "nan"], ["--refine", "65"], ["--convention", "klatt"],
):
    check(2, "vocode", "mel.npy", "-o", "out.wav", *options)
check(2, "mel", "in.wav", "-o", "mel.npy", "--model", "no-such-model")
check(2, "mel", "in.wav", "-o", "mel.npy", "--mel", "klatt")
check(2, "denoise", "in.wav", "-o", "out.wav", "--noise", "in.wav", "--bias", "zeros")
check(2, "evaluate", "no-such-folder")
check(2, "evaluate", ".", "--ids", "no-such-file")
check(2, "prepare", "no-such-folder", "-o", "cache")
check(2, "prepare", "-o", "cache", "--mel", "klatt")
check(2, "train", "recipe.toml", "--out", "run", "--init", "no-such-model")
check(2, "compare", "no-such-model", "--minutes", "1")
check(2, "compare", "nice")
"""


def test_no_verb_imports_torch_before_it_must(tmp_path: Path, wav: Path):
    (tmp_path / "mel.npy").touch()
    result = subprocess.run(
        [sys.executable, "-c", QUICK, *VERBS], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# vocode


def test_vocode_writes_16_bit_wav(run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path):
    out = tmp_path / "out.wav"
    result = run("vocode", mel_file, "-o", out, "--model", tiny_model)
    written = soundfile.info(out)
    assert result == Result(0, "", f"waveflow: {out}, {written.duration:.1f} s\n")
    assert (written.format, written.subtype, written.channels) == ("WAV", "PCM_16", 1)
    assert written.samplerate == SAMPLE_RATE
    assert written.frames == np.load(mel_file).shape[1] * HOP
    expected = load(tiny_model)(np.load(mel_file))
    # Half a step of 16 bits is what rounding may change.
    assert np.abs(samples(out) - expected.numpy()).max() <= 0.5 / 32768 + 1e-7


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("out.flac", [], ("FLAC", "PCM_16")),
        ("out.FLAC", [], ("FLAC", "PCM_16")),
        ("out.wav", ["--float"], ("WAV", "FLOAT")),
    ],
)
def test_output_format(
    run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path, name: str, options, kind
):
    out = tmp_path / name
    assert run("vocode", mel_file, "-o", out, "--model", tiny_model, *options).status == 0
    assert (soundfile.info(out).format, soundfile.info(out).subtype) == kind


def test_all_mel_formats_give_the_same(run: Run, tmp_path: Path, tiny_model: Path):
    mel = voice_mel()
    np.save(tmp_path / "a.npy", mel[None])
    np.savez(tmp_path / "b.npz", anything=mel)
    np.savez(tmp_path / "c.npz", mel=mel, other=np.zeros(3))
    torch.save(torch.from_numpy(mel), tmp_path / "d.pt")
    outputs = []
    for source in ("a.npy", "b.npz", "c.npz", "d.pt"):
        out = tmp_path / f"{source}.wav"
        assert run("vocode", tmp_path / source, "-o", out, "--model", tiny_model).status == 0
        outputs.append(out.read_bytes())
    assert len(set(outputs)) == 1


def test_an_output_file_is_overwritten(run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path):
    out = tmp_path / "out.wav"
    out.write_text("old")
    assert run("vocode", mel_file, "-o", out, "--model", tiny_model).status == 0
    assert len(samples(out)) > 0


def test_seed_sigma_and_refine_do_what_they_say(
    run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path
):
    def audio(*options: str) -> bytes:
        out = tmp_path / "out.wav"
        assert run("vocode", mel_file, "-o", out, "--model", tiny_model, *options).status == 0
        return out.read_bytes()

    plain = audio()
    assert audio() == audio("--seed", "0") == audio("--sigma", "1") == plain
    assert audio("--refine", "2") == plain  # the tiny model's own
    assert audio("--refine", "0") != plain
    assert audio("--seed", "1") != plain
    assert audio("--sigma", "0.5") != plain
    # Without noise there is nothing left for the seed to decide.
    assert audio("--sigma", "0", "--seed", "0") == audio("--sigma", "0", "--seed", "1")


def test_denoise_is_applied_to_what_was_made(
    run: Run,
    mel_file: Path,
    wav: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    vocoder, out = load(tiny_model), tmp_path / "out.wav"
    made = {"vocode": vocoder(np.load(mel_file)), "resynth": vocoder.resynth(samples(wav))}
    # The model has no hum to speak of.
    monkeypatch.setattr(Vocoder, "denoise", lambda self, audio, strength: audio * strength)
    for verb, source in (("vocode", mel_file), ("resynth", wav)):
        options = ("--model", tiny_model, "--denoise", "0.5", "--float")
        assert run(verb, source, "-o", out, *options).status == 0
        np.testing.assert_array_equal(samples(out), 0.5 * made[verb].numpy())


def test_threads(run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path):
    args = ("vocode", mel_file, "-o", tmp_path / "out.wav", "--model", tiny_model)
    for n in (2, 1):
        assert run(*args, "--threads", str(n)).status == 0
        assert torch.get_num_threads() == n


def loud_mel(n_frames: int) -> np.ndarray:
    """Louder than any speech; not one value in all bands, which would be padding."""
    return np.full((N_MELS, n_frames), 4.0, np.float32) + 0.01 * np.arange(N_MELS)[:, None]


def test_clipping_is_noted_once_with_the_file(run: Run, tmp_path: Path, tiny_model: Path):
    loud, out = tmp_path / "loud.npy", tmp_path / "out.wav"
    np.save(loud, loud_mel(8) - 12 * (np.arange(8) == 0))
    result = run("vocode", loud, "-o", out, "--model", tiny_model, "--float")
    assert result.status == 0
    assert result.err.count("\n") == 2
    assert f"{loud}: " in result.err and result.err.count("clipped") == 1
    assert np.abs(samples(out)).max() == 1.0


def test_a_foreign_mel_is_refused_by_name(run: Run, tmp_path: Path, tiny_model: Path):
    decibels, out = tmp_path / "db.npy", tmp_path / "out.wav"
    np.save(decibels, voice_mel() * 20 / np.log(10))
    result = run("vocode", decibels, "-o", out, "--model", tiny_model)
    assert_one_line(result, str(decibels), "--convention")
    assert not out.exists()
    named = ("--convention", "db", "--model", tiny_model)
    assert run("vocode", decibels, "-o", out, *named).status == 0
    own = tmp_path / "own.wav"
    np.save(decibels, voice_mel())
    assert run("vocode", decibels, "-o", own, "--model", tiny_model).status == 0
    assert np.abs(samples(own) - samples(out)).max() <= 2 / 32768


# vocode from and to pipes


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts bytes on the standard input."""

    def put(*parts: bytes) -> None:
        stream = io.TextIOWrapper(io.BytesIO(b"".join(parts)))
        monkeypatch.setattr(sys, "stdin", stream)

    return put


def npy(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def to_pcm(audio: torch.Tensor) -> bytes:
    return np.clip(np.round(audio.numpy() * 32768.0), -32768, 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("cuts", [[], [1, 2, 20]])
def test_vocode_from_a_pipe_to_a_pipe(
    stdin: Callable[..., None],
    capsysbinary: pytest.CaptureFixture[bytes],
    tiny_model: Path,
    cuts: list[int],
):
    mel = voice_mel()
    expected = load(tiny_model)(mel)
    stdin(*map(npy, np.split(mel, cuts, axis=1)))
    assert main(["vocode", "-", "-o", "-", "--model", str(tiny_model), "--float"]) == 0
    out, err = capsysbinary.readouterr()
    assert err == b""
    np.testing.assert_allclose(np.frombuffer(out, "<f4"), expected.numpy(), rtol=0, atol=1e-5)
    stdin(*map(npy, np.split(mel, cuts, axis=1)))
    assert main(["vocode", "-", "-o", "-", "--model", str(tiny_model)]) == 0
    steps = np.frombuffer(capsysbinary.readouterr().out, "<i2").astype(int)
    assert np.abs(steps - np.frombuffer(to_pcm(expected), "<i2")).max() <= 1


def test_vocode_between_files_and_pipes(
    stdin: Callable[..., None],
    capsysbinary: pytest.CaptureFixture[bytes],
    mel_file: Path,
    tmp_path: Path,
    tiny_model: Path,
):
    options = ["--model", str(tiny_model), "--seed", "3"]
    plain, out = tmp_path / "plain.wav", tmp_path / "out.wav"
    assert main(["vocode", str(mel_file), "-o", str(plain), *options]) == 0
    stdin(mel_file.read_bytes())
    assert main(["vocode", "-", "-o", str(out), *options]) == 0
    assert out.read_bytes() == plain.read_bytes()
    capsysbinary.readouterr()
    assert main(["vocode", str(mel_file), "-o", "-", *options]) == 0
    assert capsysbinary.readouterr().out == to_pcm(torch.from_numpy(samples(plain)))


def bad_streams() -> dict[str, tuple[bytes, str]]:
    mel = voice_mel()
    good = npy(mel)
    endless = npy(np.zeros((N_MELS, 1), np.float32)).replace(b"(80, 1), ", b"(80, 9), ")
    return {
        "empty": (b"", "empty"),
        "garbage": (b"no array", "array 1 of the stream is cut off"),
        "truncated": (good + good[:-1], "array 2 of the stream is cut off"),
        "header": (good + good[:20], "array 2 of the stream is cut off"),
        "too short": (endless, "array 1 of the stream is cut off"),
        "pickle": (npy(np.array([{}]), allow_pickle=True), "array 1"),
        "flat": (npy(mel[0]), "(bands, frames)"),
        "bands": (npy(mel[:40]), "40 bands, the model takes 80"),
        "nan": (good + npy(mel * np.nan), "array 2 of the stream holds NaN"),
        "words": (npy(np.array([["a"]])), "not real numbers"),
    }


@pytest.mark.parametrize("name", bad_streams())
def test_bad_streams(
    run: Run, stdin: Callable[..., None], tmp_path: Path, tiny_model: Path, name: str
):
    data, words = bad_streams()[name]
    stdin(data)
    result = run("vocode", "-", "-o", tmp_path / "out.wav", "--model", tiny_model)
    assert_one_line(result, "stdin", words)
    assert list(tmp_path.iterdir()) == []


def test_pipes_and_what_does_not_fit(run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path):
    model = ("--model", tiny_model)
    assert_one_line(run("vocode", tmp_path, "-o", "-", *model), "is a folder")
    assert_one_line(run("vocode", tmp_path / "no.npy", "-o", "-", *model), "does not exist")
    assert_one_line(run("vocode", "-", "-o", tmp_path / "no" / "a.wav", *model), "no folder")
    assert_one_line(run("vocode", mel_file, "-o", "-", *model, "--sigma", "nan"), "sigma")


def test_clipping_in_a_stream_is_noted_once(
    run: Run, stdin: Callable[..., None], tmp_path: Path, tiny_model: Path
):
    loud = loud_mel(300) - 12 * (np.arange(300) % 8 == 0)
    stdin(*map(npy, np.split(loud.astype(np.float32), 3, axis=1)))
    result = run("vocode", "-", "-o", tmp_path / "out.wav", "--model", tiny_model)
    assert result.status == 0
    assert result.err.count("\n") == 2 and result.err.startswith("waveflow: stdin: ")
    assert result.err.count("clipped") == 1


def test_no_verify(run: Run, mel_file: Path, wav: Path, tmp_path: Path, tiny_model: Path):
    import shutil

    folder, out = tmp_path / "model", tmp_path / "out.wav"
    shutil.copytree(tiny_model, folder)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    for verb, source in (("vocode", mel_file), ("resynth", wav)):
        args = (verb, source, "-o", out, "--model", folder)
        assert_one_line(run(*args), "damaged")
        assert run(*args, "--no-verify").status == 0


# resynth


@pytest.mark.parametrize("n_samples", [2, 300, 11025])
def test_resynth_keeps_the_length(run: Run, tmp_path: Path, tiny_model: Path, n_samples: int):
    source = write_wav(tmp_path / "in.wav", make_voice(1.0)[:n_samples])
    out = tmp_path / "out.wav"
    assert run("resynth", source, "-o", out, "--model", tiny_model).status == 0
    assert soundfile.info(out).frames == n_samples


def test_resynth_is_the_mel_and_then_vocode(run: Run, wav: Path, tmp_path: Path, tiny_model: Path):
    whole = write_wav(tmp_path / "whole.wav", samples(wav)[: 40 * HOP])
    options = ("--model", tiny_model)
    assert run("resynth", whole, "-o", tmp_path / "copy.wav", *options).status == 0
    assert run("mel", whole, "-o", tmp_path / "copy.npy", *options).status == 0
    assert run("vocode", tmp_path / "copy.npy", "-o", tmp_path / "again.wav", *options).status == 0
    assert (tmp_path / "copy.wav").read_bytes() == (tmp_path / "again.wav").read_bytes()


def test_stereo_and_another_rate_are_noted(run: Run, tmp_path: Path, tiny_model: Path):
    voice = make_voice(0.4, sample_rate=44100)
    source = write_wav(tmp_path / "in.wav", np.stack([voice, voice], 1), 44100)
    out = tmp_path / "out.wav"
    result = run("resynth", source, "-o", out, "--model", tiny_model)
    assert result.status == 0 and result.err.count("\n") == 2
    assert f"{source}: 2 channels mixed down" in result.err
    assert "resampled from 44100 Hz to 22050 Hz" in result.err
    assert soundfile.info(out).samplerate == SAMPLE_RATE
    assert abs(soundfile.info(out).frames - len(voice) / 2) <= 1


# mel


def test_mel_presets_and_models(run: Run, wav: Path, tmp_path: Path, tiny_model: Path):
    audio = torch.from_numpy(samples(wav))
    for options, preset in (
        (("--preset", "hifigan"), "hifigan"),
        (("--mel", "nvidia"), "nvidia"),
        (("--model", tiny_model), "hifigan"),
    ):
        out = tmp_path / "mel.npy"
        result = run("mel", wav, "-o", out, *options, "--threads", "1")
        mel = np.load(out)
        words = f"waveflow: {out}, {mel.shape[0]} bands, {mel.shape[1]} frames\n"
        assert result == Result(0, "", words)
        assert mel.dtype == np.float32
        expected = MelSpectrogram(MEL_PRESETS[preset])(audio).numpy()
        np.testing.assert_array_equal(mel, expected)


def test_mel_takes_a_model_or_a_preset(run: Run, wav: Path, tmp_path: Path, tiny_model: Path):
    out = tmp_path / "mel.npy"
    result = run("mel", wav, "-o", out, "--model", tiny_model, "--mel", "nvidia")
    assert_one_line(result, "--model", "--mel")


# Errors: one line, status 2, nothing written


def bad_mels() -> dict[str, tuple[Callable[[Path], object], str]]:
    mel = voice_mel()
    infinite, nan = mel.copy(), mel.copy()
    infinite[3, 4], nan[3, 4] = np.inf, np.nan
    return {
        "missing.npy": (lambda path: None, "does not exist"),
        "text.npy": (lambda path: path.write_text("no array"), "NumPy"),
        "mel.txt": (lambda path: path.write_text("1 2 3"), ".npy, .npz or .pt"),
        "text.pt": (lambda path: path.write_text("no tensor"), "tensor"),
        "nan.npy": (lambda path: np.save(path, nan), "NaN or infinite"),
        "infinite.npy": (lambda path: np.save(path, infinite), "NaN or infinite"),
        "flat.npy": (lambda path: np.save(path, mel[0]), "(bands, frames)"),
        "empty.npy": (lambda path: np.save(path, mel[:, :0]), "empty"),
        "bands.npy": (lambda path: np.save(path, mel[:40]), "40 bands, the model takes 80"),
        "turned.npy": (lambda path: np.save(path, mel.T), "transpose"),
        "pickle.npy": (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "pickled"),
    }


@pytest.mark.parametrize("name", bad_mels())
def test_bad_mels(run: Run, tmp_path: Path, tiny_model: Path, name: str):
    make, words = bad_mels()[name]
    make(tmp_path / name)
    out = tmp_path / "out.wav"
    result = run("vocode", tmp_path / name, "-o", out, "--model", tiny_model)
    assert_one_line(result, name, words)
    assert not out.exists()


def bad_recordings() -> dict[str, tuple[Callable[[Path], object], str]]:
    broken = np.array([0.0, np.nan, 0.0], np.float32)
    return {
        "missing.wav": (lambda path: None, "does not exist"),
        "text.wav": (lambda path: path.write_text("no audio"), "not an audio file"),
        "empty.wav": (lambda path: write_wav(path, np.zeros(0)), "0 samples"),
        "nothing.wav": (lambda path: path.touch(), "not an audio file"),
        "one.wav": (lambda path: write_wav(path, np.zeros(1)), "too short"),
        "nan.wav": (lambda path: write_wav(path, broken, subtype="FLOAT"), "NaN or infinite"),
    }


@pytest.mark.parametrize("name", bad_recordings())
@pytest.mark.parametrize(("verb", "out"), [("resynth", "out.wav"), ("mel", "out.npy")])
def test_bad_recordings(run: Run, tmp_path: Path, tiny_model: Path, name: str, verb: str, out: str):
    make, words = bad_recordings()[name]
    make(tmp_path / name)
    result = run(verb, tmp_path / name, "-o", tmp_path / out, "--model", tiny_model)
    assert_one_line(result, name, words)
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", "11"], "--sigma"),
        (["--sigma", "-1"], "--sigma"),
        (["--sigma", "nan"], "sigma"),
        (["--sigma", "loud"], "--sigma"),
        (["--refine", "65"], "refine"),
        (["--refine", "-1"], "--refine"),
        (["--seed", "1.5"], "--seed"),
        (["--threads", "0"], "--threads"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "meta"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--loud"], "--loud"),
        (["another.npy"], "2 inputs need a folder"),
        (["-"], "one input, not 2"),
    ],
)
def test_bad_options(
    run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path, options: list[str], words: str
):
    out = tmp_path / "out.wav"
    result = run("vocode", mel_file, "-o", out, "--model", tiny_model, *options)
    assert_one_line(result, words)
    assert not out.exists()


def test_missing_arguments_and_unknown_verbs(run: Run, mel_file: Path):
    assert_one_line(run("vocode", mel_file), "--out")
    assert_one_line(run("vocode"), "MEL")
    assert_one_line(run("sing"), "sing")


def test_unknown_model(run: Run, mel_file: Path, tmp_path: Path):
    args = ("vocode", mel_file, "-o", tmp_path / "out.wav", "--model")
    assert_one_line(run(*args, "no-such-model"), "no-such-model")
    assert_one_line(run(*args, tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("out.mp3", [], ".wav or .flac"),
        ("out", [], ".wav or .flac"),
        ("out.flac", ["--float"], "32-bit"),
        ("no/such/folder/out.wav", [], "there is no folder"),
        ("mel.npy/out.wav", [], "there is no folder"),
    ],
)
def test_outputs_that_cannot_be_written(
    run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path, name: str, options, words: str
):
    result = run("vocode", mel_file, "-o", tmp_path / name, "--model", tiny_model, *options)
    assert_one_line(result, words)


@pytest.mark.parametrize("single", [True, False])
def test_a_folder_without_permission(
    run: Run,
    mel_file: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    single: bool,
):
    # Simulated, because root, who runs tests in containers, may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    source, out = (mel_file, "out.wav") if single else (mel_file.parent, "out")
    result = run("vocode", source, "-o", tmp_path / out, "--model", tiny_model)
    assert_one_line(result, "permission")


def test_a_folder_that_cannot_be_made(run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path):
    options = ("--model", tiny_model)
    assert_one_line(run("vocode", tmp_path, "-o", mel_file, *options), "is a file")
    assert_one_line(run("vocode", tmp_path, "-o", mel_file / "out", *options), "cannot make")


@pytest.mark.parametrize("way", ["itself", "other spelling", "symlink", "hard link"])
def test_output_equal_to_input(run: Run, wav: Path, tmp_path: Path, tiny_model: Path, way: str):
    out = tmp_path / "link.wav"
    if way == "itself":
        out = wav
    elif way == "other spelling":
        out = tmp_path / ".." / tmp_path.name / wav.name
    elif way == "symlink":
        out.symlink_to(wav)
    else:
        out.hardlink_to(wav)
    before = wav.read_bytes()
    result = run("resynth", wav, "-o", out, "--model", tiny_model)
    assert_one_line(result, "also an input")
    assert wav.read_bytes() == before


def test_an_internal_error_is_one_line_and_a_traceback_only_under_debug(
    run: Run, mel_file: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(path: Path) -> np.ndarray:
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(audio_io, "read_mel", broken)
    args = ("vocode", mel_file, "-o", tmp_path / "out.wav", "--model", tiny_model)
    assert_one_line(run(*args), "ValueError", "first line", "--debug", status=1)
    result = run("--debug", *args)
    assert result.status == 1 and "Traceback" in result.err


# Folder jobs


@pytest.fixture
def mels(tmp_path: Path) -> Path:
    folder = tmp_path / "mels"
    folder.mkdir()
    for seed in range(3):
        np.save(folder / f"clip{seed}.npy", voice_mel(0.3 + 0.1 * seed, seed))
    (folder / "notes.txt").write_text("not a mel")
    return folder


def test_a_file_alone_and_in_a_folder_sound_the_same(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path
):
    out = tmp_path / "deep" / "wavs"
    result = run("vocode", mels, "-o", out, "--model", tiny_model, "--seed", "3")
    assert (result.status, result.out) == (0, "")
    assert f"3 written to {out}" in result.err
    assert sorted(path.name for path in out.iterdir()) == [f"clip{i}.wav" for i in range(3)]
    for seed in range(3):
        alone = tmp_path / "alone.wav"
        source = mels / f"clip{seed}.npy"
        assert run("vocode", source, "-o", alone, "--model", tiny_model, "--seed", "3").status == 0
        assert alone.read_bytes() == (out / f"clip{seed}.wav").read_bytes()


def test_a_folder_job_keeps_what_is_there_unless_forced(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path
):
    out = tmp_path / "wavs"
    out.mkdir()
    (out / "clip1.wav").write_text("kept")
    result = run("vocode", mels, "-o", out, "--model", tiny_model)
    assert result.status == 0
    assert "2 written" in result.err and "1 kept (--force" in result.err
    assert (out / "clip1.wav").read_text() == "kept"
    result = run("vocode", mels, "-o", out, "--model", tiny_model, "--force")
    assert result.status == 0
    assert "3 written" in result.err and "kept" not in result.err
    assert len(samples(out / "clip1.wav")) > 0


def test_a_folder_job_goes_on_after_bad_files_and_lists_them_at_the_end(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path
):
    np.save(mels / "a.npy", np.zeros((40, 5), np.float32))
    (mels / "b.npy").write_text("no array")
    out = tmp_path / "wavs"
    result = run("vocode", mels, "-o", out, "--model", tiny_model)
    assert result.status == 2
    assert len(list(out.iterdir())) == 3
    summary, first, second = result.err.splitlines()
    assert "3 written" in summary and "2 failed" in summary
    assert str(mels / "a.npy") in first and "40 bands" in first
    assert str(mels / "b.npy") in second


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_not_utf_8(run: Run, mels: Path, tmp_path: Path, tiny_model: Path):
    strange = os.fsencode(mels) + b"/caf\xe9"
    os.mkdir(strange)
    os.rename(mels / "clip0.npy", strange + b"/\xff.npy")
    result = run("vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert result.status == 0
    assert os.path.isfile(os.fsencode(tmp_path) + b"/wavs/caf\xe9/\xff.wav")


def test_several_files_and_folders_as_outputs(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path
):
    """Of one file too, if a folder is there or the name ends in a slash; sub-folders are kept."""
    (mels / "sub").mkdir()
    files = sorted(mels.glob("*.npy"))
    files[0].rename(mels / "sub" / files[0].name)
    options = ("--model", tiny_model)
    inputs = [mels / "sub" / files[0].name, *files[1:]]
    assert run("vocode", *inputs, "-o", tmp_path / "a", *options).status == 0
    assert {path.stem for path in (tmp_path / "a").iterdir()} == {path.stem for path in files}
    assert run("vocode", inputs[0], "-o", f"{tmp_path / 'b'}/", *options).status == 0
    assert run("vocode", inputs[1], "-o", tmp_path / "b", *options).status == 0
    assert len(list((tmp_path / "b").iterdir())) == 2
    assert run("vocode", mels, "-o", tmp_path / "c", *options).status == 0
    assert (tmp_path / "c" / "sub" / f"{files[0].stem}.wav").is_file()
    assert_one_line(run("vocode", *inputs, "-o", "-", *options), "one input")
    twice = run("vocode", inputs[0], inputs[0].parent, "-o", tmp_path / "d", *options)
    assert twice.status == 0  # the same file
    clash = tmp_path / inputs[0].name
    clash.write_bytes(inputs[0].read_bytes())
    assert_one_line(run("vocode", inputs[0], clash, "-o", tmp_path / "e", *options), "both become")


def conjugate_tensor(path: Path) -> None:
    torch.save(torch.ones(80, 5, dtype=torch.complex64).conj(), path)


def quantised_tensor(path: Path) -> None:
    torch.save(torch.quantize_per_tensor(torch.ones(80, 5), 0.1, 0, torch.qint8), path)


def giant_flac(path: Path) -> None:
    """A FLAC whose header states 2^36 - 1 samples."""
    soundfile.write(path, make_voice(0.3), SAMPLE_RATE, "PCM_16")
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)


def giant_ogg(path: Path) -> None:
    """An OGG whose last page states a huge granule."""
    soundfile.write(path, make_voice(0.3), SAMPLE_RATE, format="OGG")
    data = bytearray(path.read_bytes())
    page = data.rindex(b"OggS")
    data[page + 6 : page + 14] = b"\xff" * 7 + b"\x7f"
    path.write_bytes(data)


def wav_of_no_rate(path: Path) -> None:
    """A WAV of no sample rate."""
    soundfile.write(path, make_voice(0.3), SAMPLE_RATE, "PCM_16")
    data = bytearray(path.read_bytes())
    data[24:28] = bytes(4)
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("conjugate.pt", conjugate_tensor),
        ("quantised.pt", quantised_tensor),
        ("meta.pt", lambda path: torch.save(torch.ones(80, 5, device="meta"), path)),
        ("nested.pt", lambda path: torch.save([torch.ones(80, 5)], path)),
        ("giant.flac", giant_flac),
        ("giant.ogg", giant_ogg),
        ("rate.wav", wav_of_no_rate),
    ],
)
def test_a_strange_file_is_its_own_fault(
    run: Run, tmp_path: Path, tiny_model: Path, name: str, make: Callable[[Path], object]
):
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    make(sources / name)
    is_mel = name.endswith(".pt")
    if is_mel:
        np.save(sources / "z.npy", voice_mel())
    else:
        write_wav(sources / "z.wav", make_voice(0.3))
    result = run("vocode" if is_mel else "resynth", sources, "-o", out, "--model", tiny_model)
    assert result.status == 2
    summary, bad = result.err.splitlines()
    assert "1 written" in summary and "1 failed" in summary
    assert str(sources / name) in bad and "internal error" not in bad
    assert [path.name for path in out.iterdir()] == ["z.wav"]


@pytest.mark.parametrize("verb", ["vocode", "mel"])
def test_folders_whose_names_are_not_utf_8(run: Run, tmp_path: Path, tiny_model: Path, verb: str):
    folder = os.fsencode(tmp_path) + b"/f\xff"
    os.mkdir(folder)
    if verb == "vocode":
        with open(folder + b"/caf\xe9.npy", "wb") as file:
            np.save(file, voice_mel())
    else:
        with open(folder + b"/caf\xe9.wav", "wb") as file:
            soundfile.write(file, make_voice(0.3), SAMPLE_RATE, "PCM_16", format="WAV")
    source, out = os.fsdecode(folder), os.fsdecode(folder + b"/out")
    result = run(verb, source, "-o", out, "--model", tiny_model)
    assert result.status == 0 and "1 written" in result.err and "\\udcff" in result.err
    suffix = b".wav" if verb == "vocode" else b".npy"
    assert os.listdir(os.fsencode(out)) == [b"caf\xe9" + suffix]


@pytest.mark.parametrize(
    "error", [ValueError("one\ntwo"), MemoryError(), KeyError("x"), RuntimeError("aten")]
)
def test_a_fault_of_ours_is_called_one_and_the_rest_is_made(
    run: Run,
    mels: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
):
    (mels / "clip2.npy").write_text("no array")
    read = audio_io.read_mel

    def broken(path: Path) -> np.ndarray:
        if path.name == "clip0.npy":
            raise error
        return read(path)

    monkeypatch.setattr(audio_io, "read_mel", broken)
    args = ("vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    result = run(*args)
    assert result.status == 1
    summary, theirs, ours = result.err.splitlines()
    assert "1 written" in summary and "2 failed" in summary
    assert "clip2.npy" in theirs and "internal error" not in theirs
    kind = type(error).__name__
    assert str(mels / "clip0.npy") in ours and f"internal error ({kind})" in ours
    assert ours.count(kind) == 1 and "--debug" in ours
    assert [path.name for path in (tmp_path / "wavs").iterdir()] == ["clip1.wav"]
    assert "Traceback" in run("--debug", *args).err


def test_an_error_of_the_system_is_that_files(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path
):
    (mels / "deep").mkdir()
    np.save(mels / "deep" / "a.npy", voice_mel())
    out = tmp_path / "wavs"
    out.mkdir()
    (out / "deep").write_text("a file where a folder has to be")
    result = run("vocode", mels, "-o", out, "--model", tiny_model)
    assert result.status == 2
    summary, bad = result.err.splitlines()
    assert "3 written" in summary and "deep/a.npy: File exists" in bad


FORMATS = {
    ".wav": "WAV",
    ".wave": "WAV",
    ".bwf": "WAVEX",
    ".rf64": "RF64",
    ".w64": "W64",
    ".flac": "FLAC",
    ".aiff": "AIFF",
    ".aif": "AIFF",
    ".aifc": "AIFF",
    ".caf": "CAF",
    ".au": "AU",
    ".snd": "AU",
    ".sph": "NIST",
    ".nist": "NIST",
    ".voc": "VOC",
    ".ircam": "IRCAM",
    ".pvf": "PVF",
    ".paf": "PAF",
    ".avr": "AVR",
    ".svx": "SVX",
    ".8svx": "SVX",
    ".ogg": "OGG",
    ".oga": "OGG",
    ".mp3": "MP3",
    ".htk": "HTK",
    ".sds": "SDS",
    ".amb": "WAVEX",
}


def test_folders_take_all_audio_and_mirror_their_folders(run: Run, tmp_path: Path):
    source, out = tmp_path / "in", tmp_path / "in" / "mels"
    voice = make_voice(0.3)
    for i, (suffix, kind) in enumerate(FORMATS.items()):
        path = source / f"{i % 3}" / "deep" / f"{suffix[1:]}{suffix.upper()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            soundfile.write(file, voice, SAMPLE_RATE, format=kind)
    args = ("mel", source, "-o", out, "--preset", "hifigan")
    result = run(*args)
    assert result.status == 0, result.err
    assert f"{len(FORMATS)} written to {out}" in result.err
    made = sorted(path.relative_to(out).with_suffix("") for path in out.rglob("*.npy"))
    inputs = [path for path in source.rglob("*") if path.is_file() and out not in path.parents]
    assert made == sorted(path.relative_to(source).with_suffix("") for path in inputs)
    # The outputs lie below the inputs, and are none.
    assert f"0 written to {out}, {len(FORMATS)} kept" in run(*args).err


def test_every_suffix_that_can_be_written_is_tried():
    from waveflow.files import AUDIO_SUFFIXES

    assert set(AUDIO_SUFFIXES) - set(FORMATS) == {".opus", ".mp2", ".sf", ".wve", ".xi"}


def test_what_a_folder_job_leaves_out_is_counted_and_named(
    run: Run, tmp_path: Path, tiny_model: Path
):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    write_wav(source / "a.wav", make_voice(0.3))
    (source / "deep" / "b.M4A").touch()
    (source / "c.flac").symlink_to(tmp_path / "nowhere.flac")
    (source / "circle.wav").symlink_to(source / "circle.wav")
    (source / "linked").symlink_to(source / "deep")
    os.mkfifo(source / "d.caf")
    (source / "notes.txt").write_text("words")
    (source / "plain").write_bytes((source / "a.wav").read_bytes())
    (source / ".hidden.wav").touch()
    result = run("mel", source, "-o", tmp_path / "out", "--preset", "hifigan")
    assert result.status == 0
    summary, line = result.err.splitlines()
    assert "1 written" in summary
    assert "6 left out: " in line
    for words in (
        "c.flac (a dangling",
        "circle.wav (",
        "d.caf (no plain",
        "deep/b.M4A (.m4a is",
        "plain (it looks",
    ):
        assert words in line
    assert "linked (a link to a folder" in line and "notes" not in line and "hidden" not in line
    (source / "a.wav").unlink()
    result = run("mel", source, "-o", tmp_path / "out", "--preset", "hifigan")
    assert_one_line(result, "holds no .wav", "6 left out", "b.M4A")


@pytest.mark.parametrize("case", ["several", "slash", "existing", "with a folder"])
def test_outputs_into_a_folder(
    run: Run, mels: Path, mel_file: Path, tmp_path: Path, tiny_model: Path, case: str
):
    out = tmp_path / "wavs"
    sources: list[Path] = [mel_file]
    if case == "several":
        sources += [mels / "clip0.npy", mels / "missing.npy"]
    elif case == "with a folder":
        sources += [mels]
    elif case == "existing":
        out.mkdir()
    target = f"{out}/" if case == "slash" else out
    result = run("vocode", *sources, "-o", target, "--model", tiny_model)
    made = sorted(path.name for path in out.iterdir())
    if case == "several":
        assert result.status == 2 and "missing.npy does not exist" in result.err
        assert made == ["clip0.wav", "mel.wav"]
    else:
        assert result.status == 0, result.err
        assert made == (["clip0.wav", "clip1.wav", "clip2.wav"] * (len(sources) - 1)) + ["mel.wav"]


def test_inputs_of_other_folders_are_safe(run: Run, mels: Path, tmp_path: Path, tiny_model: Path):
    """Outputs of one folder would be inputs of another."""
    inner = tmp_path / "in" / "in"
    inner.mkdir(parents=True)
    write_wav(inner / "a.wav", make_voice(0.3))
    before = (inner / "a.wav").read_bytes()
    write_wav(tmp_path / "in" / "b.wav", make_voice(0.3))
    for sources, out in (([tmp_path / "in"], tmp_path), ([inner / "a.wav"], inner)):
        (tmp_path / "b.wav").unlink(missing_ok=True)
        result = run("resynth", *sources, "-o", out, "--model", tiny_model, "--force")
        if out == tmp_path:
            # in/a.wav and b.wav: the outputs mirror the inputs one folder higher.
            assert result.status == 0 and (tmp_path / "in" / "a.wav").is_file()
        else:
            assert_one_line(result, "also an input")
    write_wav(tmp_path / "in" / "a.wav", make_voice(0.2))
    result = run("resynth", tmp_path / "in", "-o", tmp_path, "--model", tiny_model)
    assert_one_line(result, "also an input", "in/a.wav")
    assert (inner / "a.wav").read_bytes() == before
    result = run("vocode", mels / "clip0.npy", mels, "-o", tmp_path / "w", "--model", tiny_model)
    assert result.status == 0


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".NPZ", ".Npy"])
def test_mel_writes_what_vocode_reads_and_both_say_so(
    run: Run, wav: Path, tmp_path: Path, tiny_model: Path, suffix: str
):
    mel, out = tmp_path / f"made{suffix}", tmp_path / "out.wav"
    result = run("mel", wav, "-o", mel, "--model", tiny_model)
    assert (result.status, result.err) == (0, f"waveflow: {mel}, 80 bands, 43 frames\n")
    result = run("vocode", mel, "-o", out, "--model", tiny_model)
    assert (result.status, result.err) == (0, f"waveflow: {out}, 0.5 s\n")


@pytest.mark.parametrize("content", ["named", "one array"])
def test_a_dict_of_tensors_is_read(run: Run, tmp_path: Path, tiny_model: Path, content: str):
    mel = torch.from_numpy(voice_mel())
    both = {"mel": mel, "f0": torch.ones(3)} if content == "named" else {"spectrogram": mel}
    torch.save(both, tmp_path / "mel.pt")
    args = ("vocode", tmp_path / "mel.pt", "-o", tmp_path / "out.wav", "--model", tiny_model)
    assert run(*args).status == 0


@pytest.mark.parametrize("verb", ["resynth", "denoise"])
def test_one_file_is_announced(run: Run, wav: Path, tmp_path: Path, tiny_model: Path, verb: str):
    out = tmp_path / "out.flac"
    result = run(verb, wav, "-o", out, "--model", tiny_model)
    assert result.status == 0
    assert result.err.splitlines()[-1] == f"waveflow: {out}, 0.5 s"


def test_resynth_and_mel_take_folders(run: Run, tmp_path: Path, tiny_model: Path):
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    write_wav(recordings / "a.wav", make_voice(0.3))
    write_wav(recordings / "b.flac", make_voice(0.3, 1))
    assert run("resynth", recordings, "-o", tmp_path / "c", "--model", tiny_model).status == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["a.wav", "b.wav"]
    assert run("mel", recordings, "-o", tmp_path / "m", "--preset", "nvidia").status == 0
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["a.npy", "b.npy"]


def test_a_folder_job_never_writes_over_its_inputs(run: Run, tmp_path: Path, tiny_model: Path):
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    write_wav(recordings / "a.wav", make_voice(0.3))
    before = (recordings / "a.wav").read_bytes()
    result = run("resynth", recordings, "-o", recordings, "--model", tiny_model, "--force")
    assert_one_line(result, "also an input")
    assert (recordings / "a.wav").read_bytes() == before


def test_two_inputs_of_one_output(run: Run, mels: Path, tmp_path: Path, tiny_model: Path):
    np.savez(mels / "clip0.npz", voice_mel())
    result = run("vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert_one_line(result, "clip0.npy", "clip0.npz")


def test_an_empty_folder(run: Run, tmp_path: Path, tiny_model: Path):
    (tmp_path / "empty").mkdir()
    result = run("vocode", tmp_path / "empty", "-o", tmp_path / "out", "--model", tiny_model)
    assert_one_line(result, "holds no")


def test_an_interrupted_folder_job_leaves_nothing_half_written(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    write, calls = soundfile.SoundFile.write, itertools.count(1)

    def interrupted(file: soundfile.SoundFile, audio: np.ndarray) -> None:
        call = next(calls)
        write(file, audio)
        if call == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(soundfile.SoundFile, "write", interrupted)
    result = run("vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert_one_line(result, "interrupted", status=130)
    made = sorted(path.name for path in (tmp_path / "wavs").iterdir())
    assert 1 <= len(made) <= 2 and set(made) < {"clip0.wav", "clip1.wav", "clip2.wav"}
    for name in made:
        assert soundfile.info(tmp_path / "wavs" / name).frames > 0


def test_progress_goes_to_a_terminal_on_stderr(
    run: Run, mels: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    result = run("vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert result.status == 0 and result.out == ""
    assert "files" in result.err and "3/3" in result.err


def test_results_go_to_stdout_beside_a_bar_and_notes_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.counting("files") as progress:
        progress(1, 2)
        console.show("a result")
    assert capsys.readouterr().out == "a result\n"
    console.note("two\nlines")
    assert capsys.readouterr() == ("", "waveflow: two lines\n")


# prepare and train

RECIPE = """
mel = "hifigan"
[model]
type = "frameglow"
n_flows = 1
hidden_channels = 16
dilations = [1]
encoder_channels = 16
encoder_layers = 1
[synthesis]
refine_steps = 1
[train]
steps = 3
batch_size = 2
segment_frames = 16
energy_weight = 1.0
calibration_weight = 1.0
pitch_steps = 1
validate_every = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    assert main(["prepare", str(tiny_corpus), "-o", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `prepare` in this process: starting others takes longer than the work here."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_prepare_reports(run: Run, tiny_corpus: Path, tmp_path: Path):
    extra = tmp_path / "extra"
    extra.mkdir()
    write_wav(extra / "x.wav", make_voice(0.5, sample_rate=44100), 44100)
    write_wav(extra / "y.wav", make_voice(0.5))
    (extra / "bad.wav").write_text("no audio")
    out = tmp_path / "cache"
    options = ("-o", out, "--workers", "1", "--mel", "nvidia")
    result = run("prepare", tiny_corpus, extra, *options)
    assert result.status == 0 and result.err == ""
    assert "clips (0.00 hours) for training" in result.out
    assert "resampled from 44100 Hz to 22050 Hz (1 of 6 clips)" in result.out
    assert "1 files left out" in result.out and "bad.wav" in result.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["clips"]) == 6 and manifest["sample_rate"] == SAMPLE_RATE


def test_prepare_errors(run: Run, tmp_path: Path, tiny_corpus: Path):
    options = ("-o", tmp_path / "cache")
    assert_one_line(run("prepare", tmp_path / "no", *options), "no such folder")
    assert_one_line(run("prepare", tmp_path, *options), "no audio")
    assert_one_line(run("prepare", tiny_corpus, "-o", tiny_corpus), "something else")
    assert_one_line(run("prepare", tiny_corpus, *options, "--mel", "klatt"), "klatt")
    assert_one_line(run("prepare", tiny_corpus, *options, "--workers", "0"), "--workers")


def weights(folder: Path) -> bytes:
    last = json.loads((folder / "checkpoints.json").read_text())["last"]
    return (folder / last / "model.safetensors").read_bytes()


def test_train_resume_info_and_vocode(
    run: Run, recipe: Path, cache: Path, mel_file: Path, tmp_path: Path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run("train", recipe, "--data", cache, "--out", whole)
    assert result.status == 0
    assert f"{whole}: 3 steps" in result.out and "best validation lower bound" in result.out
    assert result.err.count("validation lower bound") == 2

    # No minutes at all is one step; the rest follows, and nothing shows the seam.
    args = ("train", recipe, "--data", cache, "--out", parts)
    result = run(*args, "--max-minutes", "0")
    assert result.status == 0 and "1 steps" in result.out
    assert weights(parts) != weights(whole)
    result = run(*args, "--resume")
    assert result.status == 0 and "3 steps" in result.out
    assert weights(parts) == weights(whole)

    result = run("info", whole)
    assert result.status == 0 and result.err == ""
    assert "tiny (0.00 hours)" in result.out and str(whole / "step-") in result.out
    out = tmp_path / "out.wav"
    assert run("vocode", mel_file, "-o", out, "--model", whole).status == 0
    assert soundfile.info(out).frames == np.load(mel_file).shape[1] * HOP


@pytest.mark.usefixtures("one_worker")
def test_train_prepares_a_corpus_by_itself(
    run: Run, recipe: Path, tiny_corpus: Path, tmp_path: Path
):
    out = tmp_path / "run"
    args = ("train", recipe, "--out", out, "--max-minutes", "0")
    result = run(*args, "--data", tiny_corpus)
    assert result.status == 0
    assert "prepared 3 clips" in result.err
    assert (out / "cache" / "manifest.json").is_file()
    result = run(*args, "--resume")
    assert result.status == 0 and "2 steps" in result.out
    assert "prepared" not in result.err


def test_train_from_other_weights(
    run: Run, recipe: Path, cache: Path, tmp_path: Path, tiny_model: Path
):
    recipe.write_text(RECIPE.replace("[train]", "[train]\nlearning_rate = 1e-9"))
    out = tmp_path / "run"
    args = ("train", recipe, "--data", cache, "--out", out, "--max-minutes", "0")
    assert run(*args, "--init", tiny_model).status == 0
    # At no learning rate to speak of, the weights stay what they were.
    after, before = load(out).flow.state_dict(), load(tiny_model).flow.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_train_says_what_other_weights_were_not_trained_with(
    run: Run, recipe: Path, cache: Path, tmp_path: Path, tiny_model: Path
):
    args = ("--data", cache, "--max-minutes", "0", "--init", tiny_model)
    assert "was trained with" not in run("train", recipe, "--out", tmp_path / "a", *args).err
    recipe.write_text(RECIPE.replace("n_flows = 1", "n_flows = 1\nminimum_phase = true"))
    result = run("train", recipe, "--out", tmp_path / "b", *args)
    expected = f"--init {tiny_model} was trained with model.minimum_phase False, not True"
    assert result.status == 0 and result.err.count("was trained with") == 1
    assert expected in result.err
    # Before the weights are refused.
    recipe.write_text(RECIPE.replace("n_flows = 1", "n_flows = 1\nnoise_share = true"))
    result = run("train", recipe, "--out", tmp_path / "c", *args)
    assert result.status == 2 and not (tmp_path / "c").exists()
    assert f"--init {tiny_model} was trained with model.noise_share False, not True" in result.err
    assert "lacks tensor 'conditioner.noise.coefficients.bias'" in result.err.splitlines()[-1]


def test_train_errors(
    run: Run, recipe: Path, cache: Path, tiny_corpus: Path, tmp_path: Path, tiny_model: Path
):
    out = tmp_path / "run"
    args = ("train", recipe, "--out", out)
    data = ("--data", cache)
    assert_one_line(run(*args), "--data")
    assert_one_line(run("train", tmp_path / "no.toml", "--out", out, *data), "no.toml")
    assert_one_line(run(*args, "--data", tmp_path / "no"), "no such folder")
    assert_one_line(run(*args, *data, "--data", tiny_corpus), "one cache")
    assert_one_line(run(*args, *data, "--init", "no-such-model"), "no-such-model")
    assert_one_line(run(*args, *data, "--device", "toaster"), "toaster")
    assert_one_line(run(*args, *data, "--max-minutes", "-1"), "--max-minutes")
    assert_one_line(run("train", recipe, "--out", recipe / "run", *data), "recipe.toml")
    recipe.write_text(RECIPE + "\nspeling = 1")
    assert_one_line(run(*args, *data), "speling")
    assert not out.exists()


def test_a_run_is_not_started_twice(
    run: Run, recipe: Path, cache: Path, tiny_corpus: Path, tmp_path: Path
):
    out = tmp_path / "run"
    assert run("train", recipe, "--data", cache, "--out", out, "--max-minutes", "0").status == 0
    before = weights(out)
    result = run("train", recipe, "--data", tiny_corpus, "--out", out)
    assert_one_line(result, "--resume")
    assert weights(out) == before and not (out / "cache").exists()


@pytest.mark.usefixtures("one_worker")
def test_a_corpus_of_one_clip_cannot_be_validated(run: Run, recipe: Path, tmp_path: Path):
    corpus = tmp_path / "one"
    corpus.mkdir()
    write_wav(corpus / "a.wav", make_voice(0.5))
    result = run("train", recipe, "--data", corpus, "--out", tmp_path / "run")
    assert result.status == 2 and "no validation clips" in result.err.splitlines()[-1]


# evaluate, info and cost


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two recordings; only the figure that needs no optional package is measured."""
    from waveflow.metrics import copies

    light = tuple(metric for metric in copies.METRICS if metric.package is None)
    monkeypatch.setattr(copies, "METRICS", light)
    monkeypatch.setattr(copies, "griffin_lim", lambda mel, *_: torch.zeros(mel.shape[1] * HOP))
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed in range(2):
        write_wav(folder / f"clip{seed}.wav", make_voice(0.3, seed))
    return folder


def test_evaluate_prints_a_table_and_writes_json(
    run: Run, recordings: Path, tmp_path: Path, tiny_model: Path
):
    figures = tmp_path / "figures.json"
    ids = tmp_path / "ids.txt"
    ids.write_text("clip1\n")
    options = ("--model", tiny_model, "--json", figures, "--threads", "1")
    sampling = ("--seed", "2", "--sigma", "0.9", "--refine", "1")
    result = run("evaluate", recordings, *options, *sampling)
    assert result.status == 0
    assert "2 clips" in result.out and "Griffin-Lim" in result.out and "speech" in result.out
    assert "PESQ" in result.err  # left out, and said so
    whole = json.loads(figures.read_text())
    assert (whole["n_clips"], whole["seed"], whole["sigma"]) == (2, 2, 0.9)
    assert [row["name"] for row in whole["rows"]][1:3] == ["model + 0 steps", "model + 1 steps"]
    clips = [recordings / f"clip{i}.wav" for i in range(2)]
    expected = measure_copies(load(tiny_model), clips, SynthesisOptions(sigma=0.9, seed=2))
    assert whole["log_prob_draw"] == pytest.approx(expected.log_prob_draw, rel=1e-9)
    assert run("evaluate", recordings, *options, "--ids", ids).status == 0
    assert json.loads(figures.read_text())["n_clips"] == 1


def test_evaluate_goes_on_after_a_bad_file(run: Run, recordings: Path, tiny_model: Path):
    (recordings / "bad.wav").write_text("no audio")
    result = run("evaluate", recordings, "--model", tiny_model)
    assert result.status == 2
    assert "2 clips" in result.out and "bad.wav" in result.err.splitlines()[-1]


def test_evaluate_errors(run: Run, recordings: Path, tmp_path: Path, tiny_model: Path):
    args = ("evaluate", recordings, "--model", tiny_model)
    assert_one_line(run("evaluate", tmp_path / "no", "--model", tiny_model), "not a folder")
    assert_one_line(run(*args, "--json", tmp_path / "no" / "x.json"), "there is no folder")
    assert_one_line(run(*args, "--ids", tmp_path / "no.txt"), "no.txt")
    (tmp_path / "ids.txt").write_text("clip9\n")
    assert_one_line(run(*args, "--ids", tmp_path / "ids.txt"), "clip9")
    assert_one_line(run(*args, "--sigma", "nan"), "sigma")


def test_info_of_a_model(run: Run, tiny_model: Path):
    result = run("info", tiny_model)
    assert result.status == 0 and result.err == ""
    facts = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    n = sum(p.numel() for p in load(tiny_model).flow.parameters())
    assert facts["parameters"] == f"{n:,}"
    assert "hifigan: 22050 Hz, hop 256, 80 bands" in facts["mel"]
    assert "per second of audio" in facts["multiply-adds"]
    assert facts["licence"] == "CC0-1.0" and "1.2500 on" in facts["log-likelihood"]
    assert "speed" not in facts


def test_info_measures_speed(run: Run, tiny_model: Path):
    result = run("info", tiny_model, "--speed")
    assert result.status == 0 and result.err == ""
    line = result.out.splitlines()[-1]
    assert "times real time on 1 CPU thread (10-second clip, 2 refinement steps" in line
    assert "first call" in line


@pytest.fixture
def shipped(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in the place of the default that ships, with an example."""
    import shutil

    from waveflow import pretrained

    root = tmp_path / "pretrained"
    folder = root / pretrained.DEFAULT_MODEL
    shutil.copytree(tiny_model, folder)
    np.save(folder / "example.npy", voice_mel())
    monkeypatch.setattr(pretrained, "_root", lambda: root)
    return folder


def test_without_a_model_the_default_is_taken(run: Run, shipped: Path, wav: Path, tmp_path: Path):
    result = run("info")
    assert result.status == 0
    for word in (shipped.name, "(default)", "frameglow", "1.2500", "CC0-1.0"):
        assert word in result.out
    assert run("vocode", shipped / "example.npy", "-o", tmp_path / "a.wav").status == 0
    assert run("mel", wav, "-o", tmp_path / "a.npy").status == 0
    result = run("info", "--speed")
    assert result.status == 0 and "times real time on 1 CPU thread (" in result.out


def test_info_where_nothing_ships(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("waveflow.pretrained._root", lambda: tmp_path)
    assert_one_line(run("info"), "no model ships", status=0)
    assert_one_line(run("info", "nothing"), "nothing")


def test_multiply_adds_are_counted_for_each_second_of_audio(tiny_model: Path):
    vocoder = load(tiny_model)

    def decode(z: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        # One product of 7 x 11 x 13 multiply-adds for each frame.
        return torch.zeros(mel.shape[2], 7, 11) @ torch.zeros(mel.shape[2], 11, 13)

    vocoder.flow.decode = decode  # type: ignore[assignment]
    assert macs_per_second(vocoder) == pytest.approx(7 * 11 * 13 * SAMPLE_RATE / HOP, rel=1e-9)


def test_cost_of_a_model(tiny_model: Path):
    vocoder = load(tiny_model)
    assert count_parameters(torch.nn.Linear(3, 4)) == 16
    before = torch.get_num_threads()
    speed = measure_speed(vocoder, clip_seconds=0.2, threads=before + 1, runs=3)
    assert torch.get_num_threads() == before
    assert speed.times_real_time > 0 and speed.first_call_seconds > 0
    assert (speed.threads, speed.runs) == (before + 1, 3)
    assert speed.clip_seconds == pytest.approx(0.2, abs=HOP / SAMPLE_RATE)


# As a process of its own


def process(args: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)


def test_exit_status_of_the_process(tmp_path: Path):
    result = process(["-m", "waveflow", "vocode", "no.npy", "-o", "out.wav"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "waveflow: no.npy does not exist\n"
    result = process(["-m", "waveflow", "--version"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"waveflow {__version__}\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_live_pipe_speaks_before_its_end_and_may_be_closed(tmp_path: Path, tiny_model: Path):
    """Audio comes while the mel is still coming; a listener that leaves is no error."""
    args = ["vocode", "-", "-o", "-", "--model", tiny_model, "--threads", "1"]
    mels_out, mels_in = os.pipe()
    audio_out, audio_in = os.pipe()
    pipes = {"stdin": mels_out, "stdout": audio_in, "close": (mels_in, audio_out)}
    running = Forked(lambda: command(args), tmp_path, **pipes)
    os.close(mels_out)
    os.close(audio_in)
    with os.fdopen(mels_in, "wb", buffering=0) as mels, os.fdopen(audio_out, "rb") as audio:
        mels.write(npy(np.tile(voice_mel(), 4)))
        assert len(audio.read(2 * HOP)) == 2 * HOP
        audio.close()
        try:
            for _ in range(8):
                mels.write(npy(np.tile(voice_mel(), 4)))
        except BrokenPipeError:
            pass  # it may have noticed before all was written
    assert running.wait() == Outcome(0, "", "")


def test_ctrl_c_ends_a_training_cleanly(run: Run, recipe: Path, cache: Path, tmp_path: Path):
    recipe.write_text(RECIPE.replace("steps = 3\n", "steps = 100000\n"))
    out = tmp_path / "run"

    def interrupt() -> None:
        # A checkpoint shows that the loop is running.
        while not list(out.glob("step-*")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    result = run("train", recipe, "--data", cache, "--out", out)
    assert (result.status, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "waveflow: interrupted"
    assert "Traceback" not in result.err
