"""Samples and mels that nobody can mean: refused or mended, and named, at every door."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, make_voice
from torch import Tensor

from waveflow.audio.denoise import Denoiser
from waveflow.audio.io import read_audio, write_mel
from waveflow.audio.mel import MEL_PRESETS, MelConfig, MelSpectrogram
from waveflow.audio.samples import offset_of, without_offset
from waveflow.checkpoint import ModelConfig, save_checkpoint
from waveflow.cli.main import main
from waveflow.engine.checks import silence_padding
from waveflow.engine.vocoder import Vocoder, VocoderWarning, load
from waveflow.errors import AudioError, ConfigError, MelMismatchError
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig

VOICE = make_voice(0.5)
FLOOR = np.log(1e-5)


@pytest.fixture(scope="module")
def vocoder(tiny_model: Path) -> Vocoder:
    return load(tiny_model)


@pytest.fixture(scope="module")
def mel() -> Tensor:
    return MelSpectrogram(MEL_PRESETS["hifigan"])(torch.from_numpy(VOICE))


def doors(vocoder: Vocoder) -> dict[str, Callable[[Any], Tensor]]:
    """Everything that takes an array of audio."""
    denoiser = Denoiser(torch.full((513,), 0.01))
    mel = torch.full((80, 50), -8.0)
    return {
        "mel": vocoder.mel,
        "mel_to_copy": vocoder.mel_to_copy,
        "resynth": vocoder.resynth,
        "log_prob": lambda audio: vocoder.log_prob(audio, mel),
        "encode": lambda audio: vocoder.encode(audio, mel),
        "denoise": vocoder.denoise,
        "Denoiser": lambda audio: denoiser(audio, 0.1),
        "of_noise": lambda audio: Denoiser.of_noise(audio, 1024).bias,
        "MelSpectrogram": vocoder.mel_spectrogram,
    }


DOORS = [
    "mel",
    "mel_to_copy",
    "resynth",
    "log_prob",
    "encode",
    "denoise",
    "Denoiser",
    "of_noise",
    "MelSpectrogram",
]


def quantised(kind: str) -> np.ndarray:
    """The voice in integers, without the DC offset that rounding down would give."""
    info = np.iinfo(kind)
    middle = (int(info.min) + int(info.max) + 1) // 2
    half = int(info.max) + 1 - middle
    return (np.round(VOICE.astype(np.float64) * half) + middle).astype(kind)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["int16", "uint8", "int32", "int8", "uint16", ">i2"])
def test_integers_are_scaled_by_their_range(vocoder: Vocoder, door: str, kind: str) -> None:
    call, samples = doors(vocoder)[door], quantised(kind)
    info = np.iinfo(kind)
    floats = (samples.astype(np.float64) - (0 if info.min else (info.max + 1) // 2)) / (
        2.0 ** (info.bits - 1)
    )
    expected = call(torch.from_numpy(floats.astype(np.float32)))
    if door in ("mel", "mel_to_copy", "resynth", "log_prob", "encode", "denoise"):
        torch.testing.assert_close(call(samples), expected)
    native = torch.from_numpy(samples.astype(samples.dtype.newbyteorder("=")))
    torch.testing.assert_close(call(native), expected)


def with_one(value: float) -> np.ndarray:
    audio = VOICE.copy()
    audio[7] = value
    return audio


NO_AUDIO = {
    "16-bit floats": (32768 * VOICE, "divide 16-bit samples by 32768"),
    "8-bit floats": (1000 * VOICE, "peak of"),
    "1e20": (1e20 * VOICE, "peak of"),
    "float64 beyond float32": (1e300 * VOICE.astype(float), "NaN or infinite|peak of"),
    "one NaN": (with_one(np.nan), "NaN or infinite"),
    "one infinite": (with_one(-np.inf), "NaN or infinite"),
    "as soundfile reads it": (np.stack([VOICE, VOICE], 1), r"looks like \(samples, channels\)"),
    "one column": (VOICE[:, None], r"looks like \(samples, channels\)"),
    "six columns": (np.stack([VOICE] * 6, 1), r"looks like \(samples, channels\)"),
    "three axes": (VOICE[None, None], r"\(T,\) or \(B, T\)"),
    "nothing": (VOICE[:0], "not empty"),
    "int64": ((32768 * VOICE).astype(np.int64), "does not tell its range"),
    "16 bits in int32": ((32768 * VOICE).astype(np.int32), "looks like 16-bit samples"),
    "complex": (VOICE + 0j, "complex128|complex64"),
    "booleans": (VOICE > 0, "bool"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NO_AUDIO)
def test_what_cannot_be_meant_is_refused(vocoder: Vocoder, door: str, name: str) -> None:
    audio, words = NO_AUDIO[name]
    by_value = "peak" in words or "divide" in words or "NaN" in words
    if door == "MelSpectrogram" and by_value:
        return  # it is part of training, and does not look at values
    with pytest.raises(AudioError, match=words) as caught:
        doors(vocoder)[door](torch.from_numpy(audio))
    assert "\n" not in str(caught.value)
    if door not in ("Denoiser", "of_noise"):
        with pytest.raises(AudioError, match=words):
            doors(vocoder)[door](audio)


@pytest.mark.parametrize("audio", ["in.wav", None, [[1.0], [1.0, 2.0]], {"a": 1}, Path("in.wav")])
def test_no_array_is_named(vocoder: Vocoder, audio: object) -> None:
    with pytest.raises(AudioError, match="audio is an array"):
        vocoder.mel(audio)  # type: ignore[arg-type]
    with pytest.raises(MelMismatchError, match="a mel is an array of real numbers"):
        vocoder(audio)  # type: ignore[arg-type]


def test_small_batches_and_loud_floats_are_meant(vocoder: Vocoder) -> None:
    assert vocoder.mel(torch.zeros(3, 2)).shape == (3, 80, 1)
    assert vocoder.mel(torch.zeros(2, 500)).shape == (2, 80, 1)
    assert vocoder.mel(2 * make_voice(0.1) / 0.6).isfinite().all()
    # A draw has tails, and its density is a number.
    tails = 9 * torch.randn(10 * 256, generator=torch.Generator().manual_seed(0))
    assert vocoder.log_prob(tails, torch.full((80, 10), -8.0)).isfinite().all()


@pytest.mark.parametrize("kind", [np.complex64, bool, "<U3", object])
def test_a_mel_of_no_real_numbers_is_refused(vocoder: Vocoder, kind: Any) -> None:
    with pytest.raises(MelMismatchError, match="real numbers"):
        vocoder(np.full((80, 5), 1).astype(kind))


# --- files ---


def channels_of(names: str) -> np.ndarray:
    """Channels: + the voice, - its opposite, s a softer one, o silence, n another voice."""
    factors = {"+": 1, "-": -1, "s": -0.9, "o": 0}
    voices = {name: factor * VOICE for name, factor in factors.items()}
    voices["n"] = make_voice(0.5, seed=3)
    return np.stack([voices[name] for name in names], 1)


@pytest.mark.parametrize(
    ("names", "note", "expected"),
    [
        ("+-", "2 channels in opposite phase: channel 1 taken", VOICE),
        ("+s", "2 channels in opposite phase: channel 1 taken", VOICE),
        ("++--", "4 channels in opposite phase: channel 1 taken", VOICE),
        ("++", "2 channels mixed down to one", VOICE),
        ("+o", "2 channels mixed down to one", VOICE / 2),
        ("+-+-s+", "6 channels in opposite phase: channel 1 taken", VOICE),
        ("oo", "2 channels mixed down to one", 0 * VOICE),
        ("+n", "2 channels mixed down to one", channels_of("+n").mean(1)),
        ("+-+", "3 channels mixed down to one", VOICE / 3),
    ],
)
def test_channels_that_cancel_are_not_added(
    tmp_path: Path, names: str, note: str, expected: np.ndarray
) -> None:
    soundfile.write(tmp_path / "a.wav", channels_of(names), SAMPLE_RATE, "FLOAT")
    audio, _, notes = read_audio(tmp_path / "a.wav")
    assert notes == [note]
    np.testing.assert_allclose(audio, expected, atol=1e-6)


def shifts() -> dict[str, np.ndarray]:
    n = 2 * SAMPLE_RATE
    return {
        "constant": np.full(n, 0.05),
        "negative": np.full(n, -0.02),
        "after silence": np.where(np.arange(n) < n // 4, 0, 0.05),
        "drift": np.linspace(0, 0.05, n),
        "short": np.full(n // 10, 0.05),
    }


@pytest.mark.parametrize("name", shifts())
def test_a_dc_offset_is_removed_and_named(tmp_path: Path, vocoder: Vocoder, name: str) -> None:
    shift = shifts()[name].astype(np.float32)
    voice = make_voice(2.0)[: len(shift)]
    if name == "after silence":
        voice = np.where(shift == 0, 0, voice).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", voice + shift, SAMPLE_RATE, "FLOAT")
    audio, _, [note] = read_audio(tmp_path / "a.wav")
    offset = float(note.removeprefix("DC offset of ").removesuffix(" removed"))
    assert offset == pytest.approx(np.sqrt((shift**2).mean()), rel=0.35)
    # Away from steps, where an offset begins or a tone is cut, the voice is as it was.
    middle = slice(len(voice) // 4 + 2000, -2000) if len(voice) > 10000 else slice(1500, -1500)
    assert np.abs(audio - voice)[middle].max() < 0.01
    assert abs(audio[middle].mean()) < 2e-3
    with pytest.warns(VocoderWarning, match="DC offset of") as caught:
        copied = vocoder.mel_to_copy(voice + shift)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(copied, vocoder.mel_to_copy(audio))
    with pytest.warns(VocoderWarning, match="DC offset of"):
        vocoder.mel(np.stack([voice, voice + shift]))


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_audio_without_an_offset_stays_bit_for_bit(rate: int) -> None:
    noise = np.random.default_rng(0).standard_normal((40, 2 * rate)).astype(np.float32)
    voice = make_voice(1.5, 2, rate)
    slightly = voice + np.float32(0.0007)  # as one of our corpora has it
    for audio in (voice, slightly, np.zeros(rate, np.float32), voice[:1], voice[:40], voice[:700]):
        mended, notes = without_offset(audio, rate)
        assert notes == [] and mended is audio
    for seconds in (0.01, 0.1, 1.0, 2.0):
        for audio in noise[:, : round(seconds * rate)]:
            assert offset_of(0.1 * audio, rate) == 0


def test_prepare_removes_an_offset_and_still_sees_clipping(tmp_path: Path) -> None:
    from waveflow.data.cache import TrainingCache
    from waveflow.data.prepare import prepare

    pytest.importorskip("pyworld")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for seed, shift in enumerate((0, 0, 0.05, 0.051)):
        voice = make_voice(1.0, seed) + shift
        soundfile.write(corpus / f"{seed}.wav", voice, SAMPLE_RATE, "PCM_16")
    clipped = np.clip(20 * make_voice(1.0, 7) + 0.2, -1, 1)
    soundfile.write(corpus / "loud.wav", clipped, SAMPLE_RATE, "PCM_16")
    report = prepare([corpus], tmp_path / "cache", MelConfig(sample_rate=SAMPLE_RATE), workers=1)
    assert report.notes == ("DC offset of 0.05 removed (2 of 4 clips)",)
    assert [(Path(clip.file).name, clip.reason) for clip in report.left_out] == [
        ("loud.wav", "clipped")
    ]
    cache = TrainingCache(tmp_path / "cache")
    for clip in cache.manifest.clips:
        assert abs(cache.audio(clip).mean()) < 1e-3 * 32768


# --- the command line ---


def recordings() -> dict[str, tuple[np.ndarray, str, str]]:
    """Recordings that are no audio, their format, and words of the error."""
    return {
        "16-bit floats": (32768 * VOICE, "FLOAT", "divide 16-bit samples by 32768"),
        "1e20": (1e20 * VOICE, "FLOAT", "peak of"),
        "1e300": (1e300 * VOICE.astype(float), "DOUBLE", "infinite"),
        "NaN": (with_one(np.nan), "FLOAT", "NaN"),
    }


VERBS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "mel": lambda wav, out, model: ["mel", wav, "-o", out / "m.npy", "--model", model],
    "resynth": lambda wav, out, model: ["resynth", wav, "-o", out / "r.wav", "--model", model],
    "denoise": lambda wav, out, model: ["denoise", wav, "-o", out / "d.wav", "--model", model],
    "noise": lambda wav, out, model: [
        *("denoise", wav.with_name("good.flac"), "-o", out / "d.wav", "--noise", wav)
    ],
    "evaluate": lambda wav, out, model: ["evaluate", wav.parent, "--model", model, "--ids", "ids"],
}


@pytest.fixture
def call(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, np.ndarray, str], tuple[int, str, list[str]]]:
    """Runs a verb on a recording; returns status, stderr and the files that it made."""
    monkeypatch.chdir(tmp_path)
    Path("ids").write_text("bad\n")
    Path("in").mkdir()
    Path("out").mkdir()
    soundfile.write("in/good.flac", VOICE, SAMPLE_RATE)

    def run(verb: str, audio: np.ndarray, subtype: str) -> tuple[int, str, list[str]]:
        soundfile.write("in/bad.wav", audio, SAMPLE_RATE, subtype)
        capsys.readouterr()
        arguments = VERBS[verb](Path("in/bad.wav"), Path("out"), tiny_model)
        status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr().err, [path.name for path in Path("out").iterdir()]

    return run


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", recordings())
def test_verbs_refuse_what_is_no_audio(call, verb: str, name: str) -> None:
    audio, subtype, words = recordings()[name]
    status, err, made = call(verb, audio, subtype)
    assert (status, made) == (2, [])
    assert err.count("\n") == 1 and "bad.wav" in err and words in err, err


@pytest.mark.parametrize("verb", ["mel", "resynth", "denoise", "noise"])
@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (VOICE + 0.05, "bad.wav: DC offset of 0.05 removed"),
        (channels_of("+-"), "bad.wav: 2 channels in opposite phase: channel 1 taken"),
    ],
    ids=["offset", "opposite"],
)
def test_verbs_say_what_they_mend(call, verb: str, audio: np.ndarray, words: str) -> None:
    status, err, made = call(verb, audio, "FLOAT")
    assert status == 0 and len(made) == 1
    assert err.splitlines()[0] == f"waveflow: in/{words}", err


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_mel_that_is_written_is_finite(tmp_path: Path, value: float) -> None:
    mel = np.zeros((80, 5))
    mel[3, 2] = value
    with pytest.raises(MelMismatchError, match="NaN or infinite"):
        write_mel(tmp_path / "a.npy", mel)
    assert list(tmp_path.iterdir()) == []


# --- padding frames ---


def padded(mel: Tensor, value: float, place: str) -> tuple[Tensor, Tensor]:
    """A mel with padding frames, and which they are."""
    added = torch.zeros(mel.shape[1] + 12, dtype=torch.bool)
    added[{"end": slice(-12, None), "begin": slice(12), "middle": slice(9, 21)}[place]] = True
    out = torch.full((mel.shape[0], len(added)), value)
    out[:, ~added] = mel
    return out, added


@pytest.mark.parametrize("place", ["end", "begin", "middle"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -4.0, -100.0])
def test_padding_frames_are_made_silent_and_named(
    vocoder: Vocoder, mel: Tensor, value: float, place: str
) -> None:
    with_padding, added = padded(mel, value, place)
    speech = vocoder.synthesise(with_padding)
    words = f"12 of {len(added)} frames hold one value in all bands"
    assert next(note for note in speech.notes if "padding" in note).startswith(words)
    assert not any("looks" in note for note in speech.notes)
    silent = with_padding.clone()
    silent[:, added] = FLOOR
    assert torch.equal(speech.audio, vocoder.synthesise(silent).audio)


def test_padding_is_found_in_batches_and_streams(vocoder: Vocoder, mel: Tensor) -> None:
    with_padding, _ = padded(mel, 0.0, "end")
    alone = vocoder.synthesise(with_padding)
    batch = torch.stack([with_padding, with_padding.flip(1)])
    assert torch.equal(vocoder.synthesise(batch[:1]).audio[0], alone.audio)
    assert vocoder.synthesise(batch).notes[0].startswith("24 of")
    notes: list[str] = []
    pieces = vocoder.stream(with_padding.split(5, 1), on_note=notes.append)
    torch.testing.assert_close(torch.cat(list(pieces)), alone.audio, rtol=0, atol=1e-4)
    assert [note for note in notes if "padding" in note] == alone.notes[:1]
    # Told by lengths, it is nobody's fault; zeros before an item's end are.
    n_frames = mel.shape[1]
    assert not any("padding" in n for n in vocoder.synthesise(batch[:1], lengths=[n_frames]).notes)
    notes = vocoder.synthesise(batch[:1], lengths=[n_frames + 2]).notes
    assert any(note.startswith("2 of") for note in notes)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(80, 5),  # a denoiser's bias
        torch.full((80, 5), -5.0),
        torch.cat([torch.rand(80, 9), torch.zeros(80, 3)], 1),  # no logarithms: silence is 0
        torch.cat([torch.rand(80, 9) - 6, torch.full((80, 3), -11.5129)], 1),
        torch.cat([torch.rand(80, 9) - 6, torch.full((80, 3), -23.0)], 1),
        torch.cat([torch.rand(4, 9) - 6, torch.zeros(4, 3)], 1),  # a toy's four bands
    ],
)
def test_what_may_be_meant_is_no_padding(values: Tensor) -> None:
    same, count = silence_padding(values[None].numpy(), FLOOR)
    assert count == 0 and np.array_equal(same[0], values)


def test_vocode_names_padding(
    tmp_path: Path, tiny_model: Path, mel: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.npy", tmp_path / "a.wav"
    np.save(source, padded(mel, 0.0, "end")[0].numpy())
    assert not main(["vocode", str(source), "-o", str(out), "--model", str(tiny_model)])
    assert "12 of" in (err := capsys.readouterr().err) and err.count("\n") == 2


# --- long-lived processes ---


@pytest.fixture(scope="module")
def waveglow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"n_mels": 8, "n_flows": 2, "hidden_channels": 8, "n_layers": 2}
    config = ModelConfig(
        model=WaveGlowConfig(**sizes, upsample_kernel=256),
        mel=MelConfig(sample_rate=SAMPLE_RATE, n_mels=8, padding="center"),
    )
    flow = build_flow(config.model, config.mel)
    save_checkpoint(folder := tmp_path_factory.mktemp("m") / "waveglow", config, flow.state_dict())
    return folder


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("loaded", ["before", "after"])
@pytest.mark.parametrize("kind", ["tiny_model", "waveglow"])
def test_another_default_type_changes_nothing(
    request: pytest.FixtureRequest, double: None, kind: str, loaded: str
) -> None:
    folder = request.getfixturevalue(kind)
    audio = torch.from_numpy(VOICE[: 5 * 256])

    def results(vocoder: Vocoder) -> list[Tensor]:
        mel = vocoder.mel(audio)[:, :5]
        z = vocoder.encode(audio, mel)
        asked: list[Tensor] = []

        def synthesise(mel: Tensor) -> Tensor:
            asked.append(mel)
            return torch.zeros(1, 88 * 256)

        Denoiser.of_model(synthesise, vocoder.mel_config, "normal")
        return [
            vocoder.synthesise(mel).audio,
            vocoder.draw(mel, seed=3),
            vocoder.mel(audio),
            vocoder.mel_to_copy(audio),
            vocoder.log_prob(audio, mel),
            vocoder.decode(z, mel),
            vocoder.denoise(audio),
            asked[0],
            *vocoder.stream([mel], on_note=lambda note: None),
        ]

    vocoder = load(folder)
    expected = results(vocoder)
    torch.set_default_dtype(torch.float64)
    vocoder = load(folder) if loaded == "after" else copy.deepcopy(vocoder)
    for result, wanted in zip(results(vocoder), expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny_model", "waveglow"])
def test_a_vocoder_is_pickled(request: pytest.FixtureRequest, kind: str) -> None:
    vocoder = load(request.getfixturevalue(kind))
    mel = torch.full((vocoder.mel_config.n_mels, 5), -8.0)
    expected = vocoder.draw(mel)
    with torch.no_grad():  # the weights are taken as they are, not from the folder
        first = next(vocoder.flow.parameters())
        first.add_(0.01 * torch.randn_like(first))
    changed = vocoder.draw(mel)
    assert not torch.equal(expected, changed)
    for again in (pickle.loads(pickle.dumps(vocoder)), copy.deepcopy(vocoder)):
        assert torch.equal(again.draw(mel), changed)
        assert not again.flow.training
        assert all(p.requires_grad for p in again.flow.parameters())


@pytest.mark.parametrize("target", [torch.float16, torch.float64, torch.zeros(1), None])
def test_to_takes_a_device(vocoder: Vocoder, target: Any) -> None:
    with pytest.raises(ConfigError, match=r"moved to a device; load\(precision=...\)"):
        vocoder.to(target)
    assert next(vocoder.flow.parameters()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::waveflow.VocoderWarning")
def test_results_can_be_trained_on(vocoder: Vocoder, mel: Tensor) -> None:
    audio = torch.from_numpy(VOICE)
    results = [
        vocoder(mel),
        vocoder.draw(mel),
        vocoder.mel(audio),
        vocoder.mel_to_copy(audio),
        vocoder.resynth(audio),
        vocoder.log_prob(audio, mel),
        vocoder.encode(audio, mel),
        vocoder.decode(vocoder.encode(audio, mel), mel),
        vocoder.denoise(audio),
        vocoder.denoiser().bias,
        *vocoder.stream(mel.split(20, 1)),
    ]
    for result in results:
        weight = torch.ones((), requires_grad=True)
        (weight * result).sum().backward()  # autograd saves the result


def test_notes_do_not_pass_through_the_filters_of_a_process(vocoder: Vocoder, mel: Tensor) -> None:
    with_padding, _ = padded(mel, 0.0, "end")

    def speak(item: int) -> list[str]:
        return vocoder.synthesise(with_padding if item % 2 else mel).notes

    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        notes = list(pool.map(speak, range(16)))
    assert [len(own) for own in notes] == [0, 1] * 8
