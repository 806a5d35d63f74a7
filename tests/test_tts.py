"""Text to speech: what is read, alignments, the flow of mels, voices, and `waveflow say`."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from small_voice import N_MELS, tiny_model_of

import waveflow
from waveflow.cli.main import main
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import CheckpointError, ConfigError
from waveflow.model_files import manifest_bytes
from waveflow.tts import text as text_module
from waveflow.tts.alignment import best_durations
from waveflow.tts.foreign import Espeak, TransformersModel, load_acoustic
from waveflow.tts.glow_tts import LONGEST, held
from waveflow.tts.speaker import PAUSE, Speaker, load_speaker
from waveflow.tts.text import SYMBOLS, numbers, pieces_of, read_sentences
from waveflow.tts.voice import VoiceCard, load_voice, save_voice


@pytest.fixture(scope="module")
def vocoder(tiny_model: Path) -> Vocoder:
    return waveflow.load(tiny_model)


# --- text ---


def spoken(text: str) -> list[str]:
    return ["".join(symbols) for symbols in read_sentences(text)]


def test_numbers_dates_and_abbreviations_are_read() -> None:
    assert spoken("Dr. Smith has 3 dogs.") == ["dˈɑktɚ smˈɪθ hˈæz θɹˈi dˈɔɡz."]
    assert spoken("It cost $3.50!") == spoken("It cost three dollars fifty cents!")
    [date] = spoken("on 2026-11-29")
    assert "noʊvˈɛmbɚ twˈɛnti nˈaɪnθ" in date


def test_words_that_no_lexicon_has_are_spelled() -> None:
    [made_up] = spoken("Zyxomorphy")
    assert made_up.startswith("z")


def test_each_sentence_is_one() -> None:
    assert len(spoken("One. Two? Three!")) == 3
    assert len(spoken("One.\n\n...\n\nTwo")) == 2
    assert {",", ";", ":"} <= set("".join(spoken("Well, hello; world: yes.")))


def test_a_long_text_is_cut_between_sentences_and_words() -> None:
    sentence = "The quick brown fox jumps over the lazy dog. "
    pieces = list(pieces_of(sentence * 30))
    assert " ".join(pieces) == (sentence * 30).strip()
    assert all(len(p) <= text_module.LONGEST_SENTENCE and p.endswith(".") for p in pieces)
    endless = list(pieces_of("word " * 300 + "a" * 100))
    assert "".join(endless).replace(" ", "") == "word" * 300 + "a" * 100
    assert max(map(len, endless)) <= text_module.LONGEST_SENTENCE


@pytest.mark.parametrize("text", ["", "  \n", "...!?", "—", "* * *"])
def test_what_has_no_word_is_left_out(text: str) -> None:
    assert spoken(text) == []
    assert len(spoken(f"One.\n\n{text}\n\nTwo.")) == 2


@pytest.mark.parametrize("text", ["9" * 30, "$sNaN1", "1e28"])
def test_what_nobody_can_read_is_one_line(text: str) -> None:
    try:
        spoken(text)
    except ConfigError as error:
        assert "cannot be read" in str(error) and "\n" not in str(error)


def test_a_number_of_endless_words_is_spoken_in_parts() -> None:
    [*parts] = read_sentences("1e-300 " * 3 + "9" * 27)
    assert max(map(len, parts)) <= text_module.MOST_SYMBOLS
    assert sum(map(len, parts)) < 2 * text_module.MOST_SYMBOLS
    long = list(read_sentences(" ".join(["999,999,999,999"] * 25)))
    assert len(long) > 1 and max(map(len, long)) <= text_module.MOST_SYMBOLS


def test_without_gruut_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gruut", None)
    with pytest.raises(ConfigError, match=r"pip install 'waveflow\[tts\]'"):
        spoken("Hello.")


def test_blanks_lie_between_and_around_symbols() -> None:
    a, b = SYMBOLS.index("b"), SYMBOLS.index("d")
    assert numbers(["b", "d"]) == [0, a, 0, b, 0]


# --- alignment ---


def brute_force(scores: np.ndarray) -> list[int]:
    """Durations of the best path by trying all, (S,)."""
    n, length = scores.shape
    best, found = -np.inf, [0]
    for cuts in itertools.combinations(range(1, length), n - 1):
        edges = (0, *cuts, length)
        total = sum(scores[i, edges[i] : edges[i + 1]].sum() for i in range(n))
        if total > best:
            best, found = total, list(np.diff(edges))
    return found


def test_the_alignment_is_the_best_of_all_paths() -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 6), (4, 4), (3, 8), (5, 9)]
    scores = np.full((len(sizes), 5, 9), -1e4, np.float32)
    for item, (n, length) in zip(scores, sizes, strict=True):
        item[:n, :length] = rng.standard_normal((n, length))
    n_symbols, n_frames = torch.tensor(sizes).T
    found = best_durations(torch.from_numpy(scores), n_symbols, n_frames)
    for i, (n, length) in enumerate(sizes):
        expected = brute_force(scores[i, :n, :length])
        assert found[i].tolist() == expected + [0] * (5 - n)


def test_values_are_held_for_their_durations() -> None:
    values = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert held(values, torch.tensor([[2, 0, 1]]), 4)[0, 0].tolist() == [1, 1, 3, 3]


# --- the model ---


def test_the_flow_of_mels_has_the_log_determinant_of_its_jacobian() -> None:
    model = tiny_model_of(4).double()
    mel = torch.randn(1, 4, 6, dtype=torch.float64)
    mask = torch.ones(1, 1, 6, dtype=torch.float64)
    z, log_det = model.latent(mel, mask)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.latent(x, mask)[0], mel)
    expected = torch.linalg.slogdet(jacobian.reshape(z.numel(), z.numel()))[1]
    torch.testing.assert_close(log_det[0], expected)


def batch_of_two() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    text = torch.randint(0, len(SYMBOLS), (2, 5))
    return text, torch.tensor([5, 3]), torch.randn(2, N_MELS, 12), torch.tensor([12, 8])


def test_a_padded_item_counts_as_alone() -> None:
    model = tiny_model_of(N_MELS)
    text, n_symbols, mel, n_frames = batch_of_two()
    both = model(text, n_symbols, mel, n_frames)
    values = []
    for i in range(2):
        n, length = int(n_symbols[i]), int(n_frames[i])
        alone = model(text[i : i + 1, :n], n_symbols[i : i + 1], mel[i : i + 1, :, :length],
                      n_frames[i : i + 1])  # fmt: skip
        assert both.durations[i, :n].tolist() == alone.durations[0].tolist()
        values.append(alone.log_likelihood)
    expected = (12 * values[0] + 8 * values[1]) / 20
    torch.testing.assert_close(both.log_likelihood, expected, rtol=1e-5, atol=1e-5)


def test_the_likelihood_is_that_of_the_equations() -> None:
    model = tiny_model_of(N_MELS)
    text, n_symbols, mel, n_frames = (part[:1] for part in batch_of_two())
    terms = model(text, n_symbols, mel, n_frames)
    mu, _ = model.encode(text, torch.ones(1, 5))
    z, log_det = model.latent(mel, torch.ones(1, 1, 12))
    prior = torch.distributions.Normal(held(mu, terms.durations, 12), 1.0)
    expected = (prior.log_prob(z).sum() + log_det[0]) / z.numel()
    torch.testing.assert_close(terms.log_likelihood, expected, rtol=1e-5, atol=1e-5)


def test_frames_go_to_the_symbols_that_make_them_likeliest() -> None:
    model = tiny_model_of(N_MELS)
    model.prior.weight.data *= 30  # so that means differ in length, too
    text, n_symbols, mel, n_frames = (part[:1] for part in batch_of_two())
    mu, _ = model.encode(text, torch.ones(1, 5))
    z, _ = model.latent(mel, torch.ones(1, 1, 12))
    scores = torch.distributions.Normal(mu[0, :, :, None], 1.0).log_prob(z[0]).sum(1)
    expected = brute_force(scores.detach().numpy())
    assert model(text, n_symbols, mel, n_frames).durations[0].tolist() == expected


def test_without_noise_the_mel_is_the_priors_mean() -> None:
    model = tiny_model_of(N_MELS)
    text = torch.tensor([3, 9, 12, 7])
    mel = model.speak(text, noise_scale=0.0, pace=1.0, seed=0)
    mu, log_durations = model.encode(text[None], torch.ones(1, 4))
    durations = log_durations.exp().round().clamp_min(1)
    assert mel.shape[1] == durations.sum() + durations.sum() % 2
    z, _ = model.latent(mel[None], torch.ones(1, 1, mel.shape[1]))
    torch.testing.assert_close(z, held(mu, durations, mel.shape[1]), rtol=1e-4, atol=1e-4)


def test_noise_and_seed_and_pace_change_a_draw() -> None:
    model = tiny_model_of(N_MELS)
    model.duration.bias.data += 2.0
    text = torch.tensor([3, 9, 12, 7])
    first = model.speak(text, 0.5, 1.0, 0)
    assert torch.equal(first, model.speak(text, 0.5, 1.0, 0))
    assert not torch.equal(first, model.speak(text, 0.5, 1.0, 1))
    assert model.speak(text, 0.5, 2.0, 0).shape[1] < 0.7 * first.shape[1]


def test_it_learns_a_small_batch() -> None:
    model = tiny_model_of(N_MELS).train()
    model.dropout.p = 0.0
    batch = batch_of_two()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for _ in range(30):
        terms = model(*batch)
        optimizer.zero_grad()
        (terms.duration - terms.log_likelihood).backward()
        optimizer.step()
        seen.append((float(terms.log_likelihood), float(terms.duration)))
    assert seen[-1][0] > seen[0][0] + 0.2
    assert seen[-1][1] < 0.5 * seen[0][1]


# --- voices ---


def test_a_voice_is_read_as_it_was_written(tiny_voice: Path) -> None:
    voice = load_voice(tiny_voice)
    expected = tiny_model_of(N_MELS)
    assert voice.card.symbols == SYMBOLS
    for name, value in expected.state_dict().items():
        # float16 has 11 bits.
        torch.testing.assert_close(voice.model.state_dict()[name], value, rtol=2**-11, atol=1e-7)


def changed_config(folder: Path, to: Path, **changes: object) -> Path:
    card = json.loads((folder / "config.json").read_text()) | changes
    save_voice(to, VoiceCard.model_validate(card), tiny_model_of(N_MELS))
    return to


def test_what_it_speaks_is_what_its_model_speaks(tiny_voice: Path) -> None:
    voice = load_voice(tiny_voice)
    [mel] = voice.mels("Hello world.", seed=3)
    [symbols] = read_sentences("Hello world.")
    expected = voice.model.speak(torch.tensor(numbers(symbols)), voice.card.noise_scale, 1.0, 3)
    torch.testing.assert_close(mel, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_voice_is_one_line(tiny_voice: Path, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="no voice 'nobody'"):
        load_voice("nobody")
    with pytest.raises(CheckpointError, match="config"):
        load_voice(tiny_model)  # a vocoder
    other = changed_config(tiny_voice, tmp_path / "other", symbols=("a", "b"))
    with pytest.raises(CheckpointError, match="other symbols"):
        load_voice(other)
    for wrong in ({"noise_scale": -1}, {"model": {"dilations": [10**8]}}):
        folder = tmp_path / "wrong"
        changed_config(tiny_voice, folder)
        card = json.loads((folder / "config.json").read_text())
        data = json.dumps(card | wrong).encode()
        (folder / "config.json").write_bytes(data)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["config.json"] = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_bytes(manifest_bytes(manifest["sha256"]))
        with pytest.raises(CheckpointError, match=r"noise_scale|dilations"):
            load_voice(folder)
    large = changed_config(tiny_voice, tmp_path / "large", model={"width": 2**20})
    with pytest.raises(CheckpointError, match="larger"):
        load_voice(large)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        load_voice(tmp_path / "other")


def test_the_recipe_trains_and_goes_on(tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "tts" / "train.py"
    command = [sys.executable, str(recipe), "--data", str(tiny_corpus), "--out", str(tmp_path)]
    for _ in range(2):
        before = load_voice(tmp_path / "voice").card.steps if (tmp_path / "voice").is_dir() else 0
        done = subprocess.run([*command, "--minutes", "0.01"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        card = load_voice(tmp_path / "voice").card
        assert card.steps > before and card.log_likelihood is not None


# --- speech ---


def test_sentences_are_spoken_one_by_one_with_a_pause(vocoder: Vocoder, tiny_voice: Path) -> None:
    speaker = load_speaker(tiny_voice, vocoder)
    first, second, third = speaker.stream(["One. Two.", "Three."])
    pause = np.zeros(round(PAUSE * 22050), np.float32)
    alone = [speaker(text) for text in ("One.", "Two.", "Three.")]
    np.testing.assert_array_equal(first, alone[0])
    np.testing.assert_array_equal(second, np.concatenate([pause, alone[1]]))
    np.testing.assert_array_equal(third, np.concatenate([pause, alone[2]]))
    np.testing.assert_array_equal(speaker("One. Two."), np.concatenate([first, second]))
    assert not np.array_equal(speaker("One.", seed=1)[:256], alone[0][:256])
    assert speaker("One.", seed=10**30).size


def test_a_text_without_a_word_is_refused(vocoder: Vocoder, tiny_voice: Path) -> None:
    with pytest.raises(ConfigError, match="no word"):
        load_speaker(tiny_voice, vocoder)("...")


def test_weights_cannot_ask_for_an_endless_mel() -> None:
    model = tiny_model_of(N_MELS)
    for bias in (1e3, float("nan")):
        model.duration.bias.data.fill_(bias)
        assert model.speak(torch.tensor([3, 9]), 0.5, 1.0, 0).shape[1] <= 2 * LONGEST


def test_a_pace_out_of_range_is_refused(vocoder: Vocoder, tiny_voice: Path) -> None:
    with pytest.raises(ConfigError, match="pace 9"):
        load_speaker(tiny_voice, vocoder)("Hello.", pace=9)


class _TwoTones:
    """An acoustic model of another convention."""

    convention = "log10"
    refine_steps = 1

    def mels(self, text: str, pace: float, seed: int) -> list[torch.Tensor]:
        return [torch.full((80, 20), -3.0)]


def test_another_systems_mels_are_converted(vocoder: Vocoder) -> None:
    audio = load_speaker(_TwoTones(), vocoder)("Hello.")
    mel = torch.full((80, 20), -3.0)
    expected = vocoder(mel, convention="log10", refine=1).numpy()
    np.testing.assert_array_equal(audio, expected)
    refined = load_speaker(_TwoTones(), vocoder)("Hello.", refine=2)
    np.testing.assert_array_equal(refined, vocoder(mel, convention="log10", refine=2).numpy())


# --- other systems' text to mel ---


@pytest.fixture
def espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program espeak-ng that writes a second of a tone, and its arguments and input."""
    tone = 0.3 * np.sin(np.arange(22050) * 0.05)
    soundfile.write(tmp_path / "tone.wav", tone, 22050, "PCM_16")
    program = tmp_path / "espeak-ng"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/args\ncat > {tmp_path}/text\ncat {tmp_path}/tone.wav\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_espeak_is_revoiced(espeak: Path, vocoder: Vocoder) -> None:
    audio = load_speaker("espeak", vocoder)("Hello; rm -rf $HOME.", pace=2)
    assert (espeak / "text").read_text() == "Hello; rm -rf $HOME."
    assert "-s 350" in (espeak / "args").read_text()
    tone, _ = soundfile.read(espeak / "tone.wav", dtype="float32")
    expected = vocoder.resynth(tone)
    assert len(audio) - len(tone) in range(256)
    np.testing.assert_allclose(audio[: len(tone)], expected, atol=1e-6)


def test_espeaks_failure_is_one_line(espeak: Path, vocoder: Vocoder) -> None:
    (espeak / "espeak-ng").write_text("#!/bin/sh\necho 'no voice data' >&2\nexit 3\n")
    with pytest.raises(ConfigError, match="status 3: no voice data"):
        load_speaker("espeak", vocoder)("Hello.")


def test_without_espeak_the_remedy_is_named(
    vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="espeak-ng: install it"):
        Espeak(vocoder)


def test_a_model_of_transformers_speaks(tmp_path: Path, vocoder: Vocoder) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "hello": 3, "world": 4}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sizes: dict[str, int] = {"vocab_size": 20, "hidden_size": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_num_attention_heads": 2, f"{side}_linear_units": 16}
    torch.manual_seed(0)
    model = transformers.FastSpeech2ConformerModel(transformers.FastSpeech2ConformerConfig(**sizes))
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path)
    acoustic = load_acoustic(str(tmp_path))
    assert isinstance(acoustic, TransformersModel)
    [mel] = acoustic.mels("hello world")
    assert mel.shape[0] == 80
    audio = Speaker(acoustic, vocoder)("hello world hello", lossy=True)
    assert audio.size and np.isfinite(audio).all()
    with pytest.raises(ConfigError, match="pace"):
        Speaker(acoustic, vocoder)("hello", pace=2)


def test_no_such_acoustic_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="is no model of transformers"):
        load_acoustic(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        load_acoustic(str(tmp_path))


def test_a_bundle_of_torchaudio(monkeypatch: pytest.MonkeyPatch, vocoder: Vocoder) -> None:
    mel = torch.full((1, 80, 20), -7.0)
    bundle = SimpleNamespace(
        get_text_processor=lambda: lambda text: (torch.tensor([[len(text)]]), torch.tensor([1])),
        get_tacotron2=lambda: SimpleNamespace(infer=lambda tokens, lengths: (mel, None, None)),
    )
    pipelines = SimpleNamespace(TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH=bundle)
    monkeypatch.setitem(sys.modules, "torchaudio", SimpleNamespace(pipelines=pipelines))
    speaker = load_speaker(load_acoustic("TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH"), vocoder)
    expected = vocoder(mel[0], convention="torchaudio-griffinlim", refine=0).numpy()
    np.testing.assert_array_equal(speaker("Hello."), expected)
    with pytest.raises(ConfigError, match="no bundle TACOTRON2_X"):
        load_acoustic("TACOTRON2_X")


# --- waveflow say ---


@pytest.fixture
def say(tiny_voice: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]):
    def run(*words: object) -> tuple[int, str]:
        models = ("--voice", tiny_voice, "--model", tiny_model)
        given = words if "--acoustic" in words else (*models, *words)
        status = main(["say", *map(str, given)])
        return status, capfd.readouterr().err

    return run


def test_say_writes_a_file(say, tmp_path: Path, tiny_voice: Path, tiny_model: Path) -> None:
    out = tmp_path / "out.wav"
    status, err = say("Hello. World.", "-o", out, "--seed", "2", "--float")
    assert status == 0 and "out.wav" in err
    audio, rate = soundfile.read(out, dtype="float32")
    speaker = load_speaker(tiny_voice, tiny_model)
    assert rate == 22050
    np.testing.assert_array_equal(audio, speaker("Hello. World.", seed=2))


def test_say_reads_stdin_and_writes_samples(
    tiny_voice: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nworld.\nAnd more\n\nThe end"))
    models = ("--voice", str(tiny_voice), "--model", str(tiny_model))
    assert main(["say", "-", "-o", "-", *models]) == 0
    samples = np.frombuffer(capfdbinary.readouterr().out, "<i2")
    speaker = load_speaker(tiny_voice, tiny_model)
    expected = np.concatenate(list(speaker.stream(["Hello world.", "And more", "The end"])))
    np.testing.assert_allclose(samples / 32768, expected, atol=1 / 32768)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("", "-o", "out.wav"), "no text"),
        (("...", "-o", "out.wav"), "no word"),
        (("Hello.", "-o", "out.mp3"), ".wav or .flac"),
        (("Hello.", "-o", "missing/out.wav"), "no folder"),
        (("Hello.", "-o", "out.wav", "--pace", "9"), "pace"),
        (("Hello.", "-o", "out.wav", "--voice", "nobody"), "no voice 'nobody'"),
        (("Hello.", "-o", "out.wav", "--voice", "a", "--acoustic", "b"), "give one of them"),
        (("Hello.", "-o", "out.wav", "--acoustic", "TACOTRON2_X"), "TACOTRON2_X"),
    ],
)
def test_what_say_refuses(
    say, words: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, err = say(*words)
    assert status == 2
    assert problem in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
