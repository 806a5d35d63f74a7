"""The model that ships: it speaks, and it is the exact flow that it claims to be."""

from pathlib import Path

import numpy as np
import pytest
import torch

import waveflow
from waveflow.audio.dequantise import dequantise
from waveflow.audio.f0 import track_f0
from waveflow.engine.vocoder import Vocoder
from waveflow.metrics.voicing import voicing
from waveflow.pretrained import list_voices, model_folder, voice_folder
from waveflow.tts.speaker import Speaker
from waveflow.tts.text import numbers, read_sentences
from waveflow.tts.voice import Voice, load_voice

FIXTURES = Path(__file__).parent / "fixtures"
# Of the mel that comes with the model.
EXAMPLE_TEXT = "He had no excuse for the feelings which were aroused in him."


# The models that ship, and the most that each may fill.
MOST_BYTES = {"frameglow-cc0": 20e6, "frameglow-small-cc0": 5e6}


@pytest.fixture(scope="module", params=MOST_BYTES)
def vocoder(request: pytest.FixtureRequest) -> Vocoder:
    return waveflow.load(request.param)


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    clips = np.load(FIXTURES / "mel.npz")
    return torch.from_numpy(clips["LJ001_0002_audio_int16"] / np.float32(32768))


def test_it_is_small_and_says_where_it_comes_from(vocoder: Vocoder) -> None:
    assert waveflow.list_models() == list(MOST_BYTES)
    folder = vocoder.folder
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES[folder.name]
    assert f"{sum(p.numel() for p in vocoder.flow.parameters()):,}" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    source = vocoder.config.provenance
    assert source.licence == "CC0-1.0" and "kathleen" in source.data
    assert source.log_likelihood is not None and source.draw_log_likelihood is not None
    # Its own draws are about as likely as speech: what is heard is a sample of the density.
    assert abs(source.draw_log_likelihood - source.log_likelihood) < 0.4


def test_the_example_becomes_speech_of_that_mel(vocoder: Vocoder) -> None:
    mel = torch.from_numpy(np.load(model_folder() / "example.npy"))
    wav = vocoder(mel)
    assert wav.shape == (mel.shape[1] * 256,) and wav.dtype == torch.float32
    # The card gives 0.11 on validation clips; a broken front end or flow is far above 0.3.
    assert (vocoder.mel(wav) - mel).abs().mean() < 0.2


def test_an_unseen_voice_keeps_its_pitch(vocoder: Vocoder, speech: torch.Tensor) -> None:
    pytest.importorskip("pyworld")
    f1, cents = voicing(speech.numpy(), vocoder.resynth(speech).numpy(), 22050)
    # Measured 0.93 and 25 cents over the voice's clips; noise alone gives 0.3 and hundreds.
    assert f1 > 0.85 and cents < 60


def test_round_trips_in_float32(
    vocoder: Vocoder, speech: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    mel = vocoder.mel(speech)
    z = vocoder.encode(speech, mel)
    again = vocoder.decode(z, mel)[0]
    assert (again - speech[: len(again)]).abs().max() < 1e-4
    noise = vocoder.flow.noise(mel.shape[1], [0])
    error = (vocoder.encode(vocoder.decode(noise, mel)[0], mel) - noise).abs().max()
    # Worse this way, because quiet bands are contracted by up to e^11: measured 1e-3.
    with capsys.disabled():
        assert vocoder.folder is not None
        print(f"\nz -> audio -> z, {vocoder.folder.name}: largest error {error:.1e}")
    assert error < 0.1


def test_likelihood_tells_speech_from_its_copy_under_another_mel(
    vocoder: Vocoder, speech: torch.Tensor
) -> None:
    mel = vocoder.mel(speech)
    audio = dequantise(speech, 0)
    right = vocoder.log_prob(audio, mel).item()
    wrong = vocoder.log_prob(audio, mel.roll(20, 1)).item()
    assert right > 2 and wrong < right - 1


# --- the voice ---


@pytest.fixture(scope="module")
def voice() -> Voice:
    return load_voice()


def test_the_voice_is_small_and_says_where_it_comes_from(voice: Voice) -> None:
    folder = voice_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    assert (folder / "README.md").is_file() and "kathleen" in list_voices()
    assert voice.card.licence == "CC0-1.0" and voice.card.data == "kathleen"
    assert voice.card.log_likelihood is not None


def test_a_mel_is_likelier_under_its_own_text(voice: Voice, vocoder: Vocoder) -> None:
    """The mel that ships with the vocoder is a clip that the voice was not trained on."""
    mel = vocoder.example_mel()
    assert mel is not None
    mel = mel[None, :, : mel.shape[1] // 2 * 2]

    def log_likelihood(text: str) -> float:
        [symbols] = read_sentences(text)
        numbered = torch.tensor([numbers(symbols)])
        sizes = torch.tensor([numbered.shape[1]]), mel, torch.tensor([mel.shape[2]])
        with torch.no_grad():
            return float(voice.model(numbered, *sizes).log_likelihood)

    own = log_likelihood(EXAMPLE_TEXT)
    for other in (
        "The quick brown fox jumps over the lazy dog.",
        "She sells sea shells by the shore of the sea.",
    ):
        assert own > log_likelihood(other) + 0.03  # 700 nats in all


def test_the_voice_speaks(voice: Voice, vocoder: Vocoder) -> None:
    speaker = Speaker(voice, vocoder)
    audio = speaker("Good morning. It is half past nine.")
    seconds = len(audio) / speaker.sample_rate
    assert 1.5 < seconds < 5 and 0.05 < np.abs(audio).max() <= 1
    f0 = track_f0(audio, speaker.sample_rate, 256)
    voiced = f0[f0 > 0]
    assert 0.2 < len(voiced) / len(f0) < 0.95
    assert 150 < np.median(voiced) < 300  # a woman's voice
