"""Adapters inside the real libraries, with randomly initialised acoustic models, offline.

A library that is not installed skips its tests. transformers comes with `pip install -e '.[dev]'`.
The others, each beside the packages of this one:

    pip install --no-deps matcha-tts              # 0.0.7.2
    pip install torch==2.9.1 torchaudio==2.9.1    # a pair: another torch fails at its import
    pip install vocos                             # 0.1.0; needs torchaudio
    pip install speechbrain                       # 1.1.2
    pip install coqui-tts                         # 0.28.0
    pip install espnet                            # 202511
    pip install 'nemo_toolkit[tts]'               # 3.0.0
    pytest tests/test_hosts.py

Three have no package. HOSTS names the folder of their clones:

    git clone https://github.com/NVIDIA/waveglow                     # 8afb643
    git clone https://github.com/NVIDIA/tacotron2                    # 185cd24
    git clone https://github.com/ming024/FastSpeech2                 # d4e79eb
    git clone https://github.com/huawei-noah/Speech-Backbones        # 7782c7a
    HOSTS=$PWD pytest tests/test_hosts.py
"""

import copy
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_voice

from waveflow.adapters.coqui import CoquiVocoder, attach, coqui_audio, register
from waveflow.adapters.espnet import ESPnetVocoder
from waveflow.adapters.hifigan import HiFiGANVocoder
from waveflow.adapters.nemo import NeMoVocoder
from waveflow.adapters.nvidia import WaveGlowVocoder
from waveflow.adapters.speechbrain import SpeechBrainVocoder
from waveflow.adapters.torchaudio import TorchaudioVocoder, with_vocoder
from waveflow.adapters.transformers import TransformersVocoder
from waveflow.adapters.vocos import VocosVocoder
from waveflow.engine.vocoder import Vocoder, load

HOP = 256
# Untrained acoustic models give no speech, which a vocoder refuses without this.
ANY = {"convention": "native"}


def imported(name: str) -> Any:
    """A library, or a skip: one that does not fit its torch fails with errors of all kinds."""
    return pytest.importorskip(name, exc_type=(ImportError, OSError, RuntimeError))


@pytest.fixture(scope="module")
def vocoder(tiny_model: Path) -> Vocoder:
    return load(tiny_model)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


# --- transformers ---


def small_speecht5() -> Any:
    transformers = imported("transformers")
    sizes = {"hidden_size": 16, "vocab_size": 20, "speaker_embedding_dim": 8}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    config = transformers.SpeechT5Config(**sizes, speech_decoder_prenet_units=16)
    torch.manual_seed(0)
    return transformers.SpeechT5ForTextToSpeech(config).eval()


@pytest.fixture(scope="module")
def speecht5() -> Any:
    return small_speecht5()


SPEAKER = torch.ones(1, 8)
TEXT = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2]])


def test_speecht5(speecht5: Any, vocoder: Vocoder) -> None:
    torch.manual_seed(1)
    mel = speecht5.generate_speech(TEXT, SPEAKER, maxlenratio=4.0)
    torch.manual_seed(1)
    ours = TransformersVocoder(vocoder, **ANY)
    audio = speecht5.generate_speech(TEXT, SPEAKER, maxlenratio=4.0, vocoder=ours)
    assert audio.shape == (len(mel) * HOP,)
    assert torch.equal(audio, vocoder(mel.T, **ANY))


def test_speecht5_in_batches_with_lengths(speecht5: Any, vocoder: Vocoder) -> None:
    text = torch.cat([TEXT, TEXT])
    mask = torch.ones_like(text)
    mask[1, 4:] = 0
    waves, lengths = speecht5.generate_speech(
        text,
        SPEAKER.repeat(2, 1),
        attention_mask=mask,
        maxlenratio=4.0,
        vocoder=TransformersVocoder(vocoder, **ANY),
        return_output_lengths=True,
    )
    assert waves.shape[0] == 2 and waves.shape[1] == max(lengths)
    assert all(length % HOP == 0 for length in lengths)


def fastspeech2_config() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "vocab_size": 20,
        "speech_decoder_postnet_layers": 1,
        "speech_decoder_postnet_units": 16,
        "duration_predictor_channels": 16,
        "energy_predictor_channels": 16,
        "pitch_predictor_channels": 16,
    }
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_num_attention_heads": 2, f"{side}_linear_units": 16}
    return imported("transformers").FastSpeech2ConformerConfig(**sizes)


def small_fastspeech2() -> Any:
    return imported("transformers").FastSpeech2ConformerModel(fastspeech2_config()).eval()


def small_fastspeech2_with_hifigan() -> Any:
    transformers = imported("transformers")
    hifigan = transformers.FastSpeech2ConformerHifiGanConfig(upsample_initial_channel=16)
    whole = transformers.FastSpeech2ConformerWithHifiGanConfig(
        model_config=fastspeech2_config().to_dict(), vocoder_config=hifigan.to_dict()
    )
    return transformers.FastSpeech2ConformerWithHifiGan(whole).eval()


def small_tokenizer() -> Any:
    transformers, tokenizers = imported("transformers"), imported("tokenizers")
    words = {"[UNK]": 0, "hello": 3, "world": 4}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters)


def test_fastspeech2_conformers_slot(vocoder: Vocoder) -> None:
    model = small_fastspeech2_with_hifigan()
    model.vocoder = TransformersVocoder(vocoder, **ANY)
    with torch.no_grad():
        made = model(TEXT, return_dict=True)
    frames = made.spectrogram.shape[1]
    assert made.waveform.shape == (1, frames * HOP)
    expected = vocoder(made.spectrogram, time_major=True, **ANY)
    torch.testing.assert_close(made.waveform, expected)


def test_the_text_to_audio_pipeline(vocoder: Vocoder) -> None:
    pipeline = imported("transformers").TextToAudioPipeline(
        model=small_fastspeech2(),
        tokenizer=small_tokenizer(),
        vocoder=TransformersVocoder(vocoder, **ANY),
    )
    made = pipeline("hello world hello world")
    assert made["sampling_rate"] == 22050
    assert made["audio"].size >= HOP and made["audio"].size % HOP == 0


# --- Matcha-TTS: a HiFi-GAN's denoiser ---


def test_matchas_denoiser(vocoder: Vocoder) -> None:
    denoiser_of = imported("matcha.hifigan.denoiser").Denoiser
    ours = HiFiGANVocoder(vocoder)
    denoiser = denoiser_of(ours, mode="zeros")
    mel = -6 + torch.rand(1, 80, 40)
    audio = ours(mel).clamp(-1, 1)
    denoised = denoiser(audio.squeeze(0), strength=0.00025)
    assert denoised.shape[-1] == 40 * HOP and torch.isfinite(denoised).all()
    loud = denoiser(audio.squeeze(0), strength=1.0)
    assert not torch.allclose(loud, denoised)


# --- torchaudio: a bundle of Tacotron 2 ---


def test_torchaudios_bundle(vocoder: Vocoder) -> None:
    torchaudio = imported("torchaudio")
    bundle = torchaudio.pipelines.TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH
    ours = TorchaudioVocoder(vocoder, **ANY)
    speaker = with_vocoder(bundle, ours).get_vocoder()
    assert speaker.sample_rate == bundle.get_vocoder().sample_rate == 22050
    tacotron = torchaudio.models.Tacotron2(
        n_symbol=38, symbol_embedding_dim=16, encoder_embedding_dim=16, decoder_max_step=20
    ).eval()
    tokens, n_tokens = bundle.get_text_processor()(["Hello world", "Hello"])
    with torch.no_grad():
        mel, n_frames, _ = tacotron.infer(tokens, n_tokens)
    audio, n_samples = speaker(mel, n_frames)
    assert audio.shape == (2, mel.shape[2] * HOP)
    assert n_samples.tolist() == (n_frames * HOP).tolist()


# --- SpeechBrain ---


def test_speechbrains_tacotron2(vocoder: Vocoder) -> None:
    theirs = imported("speechbrain.inference.vocoders").HIFIGAN
    for name in ("decode_batch", "decode_spectrogram"):
        wanted = list(inspect.signature(getattr(theirs, name)).parameters)
        assert list(inspect.signature(getattr(SpeechBrainVocoder, name)).parameters) == wanted
    from speechbrain.lobes.models.Tacotron2 import Tacotron2

    sizes = {"symbols_embedding_dim": 16, "encoder_embedding_dim": 16, "attention_rnn_dim": 16,
             "decoder_rnn_dim": 16, "prenet_dim": 16, "postnet_embedding_dim": 16}  # fmt: skip
    tacotron = Tacotron2(max_decoder_steps=30, decoder_no_early_stopping=True, **sizes).eval()
    with torch.no_grad():
        mel, _, _ = tacotron.infer(torch.randint(0, 148, (2, 9)), torch.tensor([9, 9]))
    assert mel.shape == (2, 80, 30)
    audio = SpeechBrainVocoder(vocoder, **ANY).decode_batch(mel, torch.tensor([30, 20]), HOP)
    assert audio.shape == (2, 1, 30 * HOP) and not audio[1, :, 20 * HOP :].any()


# --- Vocos ---


def test_vocoss_features_and_call(vocoder: Vocoder) -> None:
    theirs = imported("vocos").Vocos.decode
    assert list(inspect.signature(theirs).parameters)[:2] == ["self", "features_input"]
    from vocos.feature_extractors import MelSpectrogramFeatures

    voice = torch.from_numpy(make_voice(1.0, sample_rate=24000))[None]
    features = MelSpectrogramFeatures()(voice)
    ours = VocosVocoder(vocoder, convention="vocos", lossy=True)
    audio = ours.decode(features)
    seconds = features.shape[2] * 256 / 24000
    assert abs(audio.shape[1] / 22050 - seconds) < 0.05 and torch.isfinite(audio).all()


# --- Coqui ---


@pytest.fixture(scope="module")
def coqui_files(tmp_path_factory: pytest.TempPathFactory, vocoder: Vocoder) -> tuple[Path, Path]:
    """Checkpoint and config of a small Glow-TTS whose mel is ours."""
    imported("TTS.utils.synthesizer")
    from TTS.config.shared_configs import BaseAudioConfig
    from TTS.tts.configs.glow_tts_config import GlowTTSConfig
    from TTS.tts.models.glow_tts import GlowTTS

    config = GlowTTSConfig(
        audio=BaseAudioConfig(**coqui_audio(vocoder.mel_config)),
        hidden_channels_enc=16,
        hidden_channels_dec=16,
        hidden_channels_dp=16,
        num_flow_blocks_dec=2,
        encoder_params={
            "kernel_size": 3,
            "dropout_p": 0.1,
            "num_layers": 1,
            "num_heads": 2,
            "hidden_channels_ffn": 16,
            "input_length": None,
        },
    )
    folder = tmp_path_factory.mktemp("coqui")
    torch.manual_seed(0)
    model = GlowTTS.init_from_config(config)
    config.save_json(str(folder / "config.json"))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return folder / "model.pth", folder / "config.json"


PAUSE = 10_000  # that Coqui adds to each sentence


def test_coquis_synthesizer(coqui_files: tuple[Path, Path], vocoder: Vocoder) -> None:
    from TTS.utils.synthesizer import Synthesizer

    checkpoint, config = coqui_files
    synthesizer = Synthesizer(tts_checkpoint=checkpoint, tts_config_path=config)
    attach(synthesizer, CoquiVocoder(vocoder, **ANY))
    wav = np.array(synthesizer.tts("Hello world."))
    assert len(wav) > PAUSE and (len(wav) - PAUSE) % HOP == 0
    assert synthesizer.output_sample_rate == 22050


def test_coqui_loads_our_files(
    coqui_files: tuple[Path, Path], vocoder: Vocoder, tmp_path: Path
) -> None:
    from TTS.utils.synthesizer import Synthesizer

    register()
    settings = tmp_path / "vocoder.json"
    settings.write_text(json.dumps({"model": "waveflow", "audio": coqui_audio(vocoder.mel_config)}))
    checkpoint, config = coqui_files
    synthesizer = Synthesizer(
        tts_checkpoint=checkpoint,
        tts_config_path=config,
        vocoder_checkpoint=vocoder.folder,
        vocoder_config=settings,
    )
    assert isinstance(synthesizer.vocoder_model, CoquiVocoder)
    wav = np.array(synthesizer.tts("Hello."))
    assert len(wav) > PAUSE and (len(wav) - PAUSE) % HOP == 0


# --- ESPnet ---


def test_espnets_text2speech(vocoder: Vocoder, tmp_path: Path) -> None:
    text2speech = imported("espnet2.bin.tts_inference").Text2Speech
    import yaml
    from espnet2.tasks.tts import TTSTask

    small = {"embed_dim": 16, "eunits": 16, "econv_chans": 16, "dunits": 16, "prenet_units": 16,
             "postnet_chans": 16, "adim": 16, "atype": "location"}  # fmt: skip
    sizes = {"n_fft": 1024, "hop_length": 256, "fs": 22050, "fmin": 0, "fmax": 8000, "n_mels": 80}
    settings = vars(TTSTask.get_parser().parse_args(["--output_dir", str(tmp_path)]))
    settings |= {
        "token_list": ["<blank>", "<unk>", *"helo", "<sos/eos>"],
        "token_type": "char",
        "feats_extract": "fbank",
        "feats_extract_conf": sizes,
        "normalize": None,
        "tts": "tacotron2",
        "tts_conf": small,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "config"}))
    speaker = text2speech(config, maxlenratio=5.0)
    ours = ESPnetVocoder(vocoder, convention="log10")
    speaker.vocoder = ours
    made = speaker("hello")
    assert speaker.fs == 22050
    assert made["wav"].shape == (len(made["feat_gen"]) * HOP,)


# --- NeMo ---


def test_nemos_mels_and_call(vocoder: Vocoder) -> None:
    """Its preprocessor, as its FastPitch has it, whose last frame is overwritten by zeros."""
    theirs = imported("nemo.collections.tts.models").HifiGanModel.convert_spectrogram_to_audio
    assert list(inspect.signature(theirs).parameters)[1:] == ["spec"]
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    preprocessor = AudioToMelSpectrogramPreprocessor(
        sample_rate=22050,
        window_size=False,
        window_stride=False,
        n_window_size=1024,
        n_window_stride=256,
        window="hann",
        normalize=None,
        n_fft=1024,
        preemph=None,
        features=80,
        lowfreq=0,
        highfreq=8000,
        log_zero_guard_type="add",
        log_zero_guard_value=1e-5,
        dither=0.0,
        pad_to=1,
        mag_power=1.0,
    )
    audio = torch.from_numpy(make_voice(0.5))[None]
    mel, _ = preprocessor(input_signal=audio, length=torch.tensor([audio.shape[1]]))
    assert not mel[:, :, -1].any()
    ours = NeMoVocoder(vocoder, convention="nemo-fastpitch", sigma=0.0)
    with pytest.warns(UserWarning, match="1 of"):
        made = ours.convert_spectrogram_to_audio(spec=mel)
    assert made.shape == (1, mel.shape[2] * HOP)
    copy = vocoder.mel_spectrogram(made)
    own = vocoder.mel_spectrogram(vocoder(vocoder.mel(audio), sigma=0.0))
    inner = slice(2, min(copy.shape[2], own.shape[2]) - 2)
    assert (copy[:, :, inner] - own[:, :, inner]).abs().mean() < 0.3  # half a hop apart


def test_nemos_fastpitch(vocoder: Vocoder) -> None:
    fastpitch_of = imported("nemo.collections.tts.models").FastPitchModel
    from omegaconf import OmegaConf

    modules = "nemo.collections.tts.modules"
    fft = {"n_layer": 1, "n_head": 1, "d_model": 16, "d_head": 16, "d_inner": 16,
           "kernel_size": 3, "dropout": 0.1, "dropatt": 0.1, "dropemb": 0.0}  # fmt: skip
    predictor = {
        "_target_": f"{modules}.fastpitch.TemporalPredictor",
        "input_size": 16,
        "kernel_size": 3,
        "filter_size": 16,
        "dropout": 0.1,
        "n_layers": 1,
    }
    tokenizer = "nemo.collections.common.tokenizers.text_to_speech.tts_tokenizers"
    config = {
        "learn_alignment": True,
        "n_speakers": 1,
        "n_mel_channels": 80,
        "symbols_embedding_dim": 16,
        "pitch_embedding_kernel_size": 3,
        "min_token_duration": 2,
        "max_token_duration": 4,
        "train_ds": {
            "dataset": {"_target_": "nemo.collections.tts.data.dataset.TTSDataset"},
            "defer_setup": True,
        },
        "text_tokenizer": {"_target_": f"{tokenizer}.EnglishCharsTokenizer"},
        "alignment_module": {
            "_target_": f"{modules}.aligner.AlignmentEncoder",
            "n_text_channels": 16,
        },
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "features": 80,
        },
        "input_fft": fft | {"_target_": f"{modules}.transformer.FFTransformerEncoder",
                            "d_embed": 16},
        "output_fft": fft | {"_target_": f"{modules}.transformer.FFTransformerDecoder"},
        "duration_predictor": predictor,
        "pitch_predictor": predictor,
    }  # fmt: skip
    fastpitch = fastpitch_of(OmegaConf.create(config)).eval()
    mel = fastpitch.generate_spectrogram(tokens=fastpitch.parse("Hello world."))
    assert mel.shape[1] == 80
    made = NeMoVocoder(vocoder, **ANY).convert_spectrogram_to_audio(spec=mel)
    assert made.shape == (1, mel.shape[2] * HOP)


def test_numpy_reads_what_a_host_gets(vocoder: Vocoder) -> None:
    """Hosts turn audio into 16-bit integers, some without a clamp."""
    audio = HiFiGANVocoder(vocoder)(-2 + torch.rand(1, 80, 10))
    as_integers = (audio.squeeze() * 32767).numpy().astype(np.int16)
    assert np.abs(as_integers.astype(int)).max() <= 32767


# --- sources without a package: clones beside each other in the folder that HOSTS names ---


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts folders of a clone first on the path; their modules, of common names, go again."""
    before = set(sys.modules)

    def add(*names: str) -> Path:
        folders = [Path(os.environ.get("HOSTS", "/nowhere"), name) for name in names]
        for folder in folders:
            if not folder.is_dir():
                pytest.skip(f"HOSTS has no {folder.name}")
            monkeypatch.syspath_prepend(folder)
        return folders[0]

    yield add
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.startswith(os.environ.get("HOSTS", "/nowhere")):
            del sys.modules[name]


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)


def test_nvidias_denoiser(source: Any, vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their inference.py goes, on a CPU and with librosa's functions of today."""
    import librosa.util

    source("waveglow", "tacotron2")
    on_the_cpu(monkeypatch)
    pad_center = librosa.util.pad_center
    monkeypatch.setattr(librosa.util, "pad_center", lambda x, size: pad_center(x, size=size))
    Denoiser = importlib.import_module("denoiser").Denoiser
    humming = copy.deepcopy(vocoder)
    with torch.no_grad():
        for parameter in humming.flow.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    waveglow = WaveGlowVocoder(humming, **ANY)
    waveglow = waveglow.remove_weightnorm(waveglow)
    waveglow.cuda().eval()
    denoiser = Denoiser(waveglow).cuda()
    audio = waveglow.infer(-6 + torch.rand(1, 80, 40), sigma=0.666)
    denoised = denoiser(audio, strength=0.01)
    assert denoised.squeeze(1).shape == audio.shape and torch.isfinite(denoised).all()
    loud = denoiser(audio, strength=1.0)
    assert not torch.allclose(loud, denoised)


def test_ming024s_fastspeech2(source: Any, vocoder: Vocoder, tmp_path: Path) -> None:
    import yaml

    folder = source("FastSpeech2")
    configs = [
        yaml.safe_load((folder / "config" / "LJSpeech" / f"{name}.yaml").read_text())
        for name in ("preprocess", "model")
    ]
    preprocess, sizes = configs
    preprocess["path"]["preprocessed_path"] = str(tmp_path)
    stats = {"pitch": [-2, 2, 0, 1], "energy": [-2, 2, 0, 1]}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    theirs = importlib.import_module("utils.model")
    model, lengths = theirs.FastSpeech2(preprocess, sizes).eval(), torch.tensor([12, 7])
    texts = torch.randint(1, 100, (2, 12))
    with torch.no_grad():
        made = model(torch.tensor([0, 0]), texts, lengths, 12, d_control=3.0)
    mels, n_frames = made[1].transpose(1, 2), made[9]
    waves = theirs.vocoder_infer(
        mels, HiFiGANVocoder(vocoder, **ANY), sizes, preprocess, n_frames * HOP
    )
    assert [len(wave) for wave in waves] == (n_frames * HOP).tolist()
    assert all(wave.dtype == np.int16 for wave in waves)


def test_grad_tts(source: Any, vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source("Speech-Backbones")
    monkeypatch.syspath_prepend(folder / "Grad-TTS")
    # Compiled, and used in training alone.
    aligner = ModuleType("model.monotonic_align")
    monkeypatch.setitem(sys.modules, "model.monotonic_align", aligner)
    GradTTS = importlib.import_module("model").GradTTS
    sizes = {"n_vocab": 20, "n_spks": 1, "spk_emb_dim": 8, "n_enc_channels": 16,
             "filter_channels": 16, "filter_channels_dp": 16, "n_heads": 2, "n_enc_layers": 1,
             "enc_kernel": 3, "enc_dropout": 0.1, "window_size": 4, "n_feats": 80, "dec_dim": 8,
             "beta_min": 0.05, "beta_max": 20.0, "pe_scale": 1000}  # fmt: skip
    generator = GradTTS(**sizes).eval()
    ours = HiFiGANVocoder(vocoder, **ANY)
    ours.remove_weight_norm()
    with torch.no_grad():
        _, mel, _ = generator(
            torch.randint(0, 20, (1, 9)), torch.tensor([9]), n_timesteps=2, length_scale=3.0
        )
    # The line of their inference.py; at exactly 1 it would wrap.
    audio = (ours.forward(mel).cpu().squeeze().clamp(-1, 1).numpy() * 32768).astype(np.int16)
    assert len(audio) == mel.shape[2] * HOP
