"""The Vocoder: what a person calls. On a model with random weights; how it sounds is not tested."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import make_voice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import waveflow
from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.checkpoint import ModelConfig, Provenance, SynthesisConfig
from waveflow.engine import decoder as engine_decoder
from waveflow.engine.fast.int8 import Int8Decoder
from waveflow.engine.fast.torch_decoder import TorchDecoder
from waveflow.engine.vocoder import Vocoder, VocoderWarning, load
from waveflow.errors import AudioError, CheckpointError, ConfigError, MelMismatchError
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.pretrained import list_models, model_folder

HOP = 256


def perturb(vocoder: Vocoder) -> Vocoder:
    """So that couplings do something; prepared again, because the 1x1 matrices have changed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in vocoder.flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    vocoder.flow.eval()
    return vocoder


@pytest.fixture(scope="module")
def vocoder(tiny_model: Path) -> Vocoder:
    return perturb(load(tiny_model))


@pytest.fixture(scope="module")
def audio() -> Tensor:
    return torch.from_numpy(make_voice(0.35))


@pytest.fixture(scope="module")
def mel(vocoder: Vocoder, audio: Tensor) -> Tensor:
    return vocoder.mel(audio)


# --- synthesis ---


def test_shapes_and_range(vocoder: Vocoder, mel: Tensor) -> None:
    n_frames = mel.shape[1]
    one = vocoder(mel)
    assert one.shape == (n_frames * HOP,)
    assert one.dtype == torch.float32
    assert vocoder(mel[None]).shape == (1, n_frames * HOP)
    assert vocoder(mel[None].repeat(3, 1, 1)).shape == (3, n_frames * HOP)
    assert vocoder(mel[:, :1]).shape == (HOP,)
    assert one.abs().max() <= 1
    assert one.std() > 0.005
    assert not one.requires_grad


def test_it_repeats_and_seeds_change_it(vocoder: Vocoder, mel: Tensor) -> None:
    first = vocoder(mel)
    assert torch.equal(first, vocoder(mel))
    assert torch.equal(first, vocoder(mel, seed=0))
    assert not torch.equal(first, vocoder(mel, seed=1))
    assert torch.equal(vocoder(mel, seed=5), vocoder(mel, seed=np.int64(5)))


def test_the_global_generator_is_neither_read_nor_written(vocoder: Vocoder, mel: Tensor) -> None:
    torch.manual_seed(1)
    first, state = vocoder(mel), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, vocoder(mel))


@pytest.mark.parametrize("refine", [0, 2])
def test_an_item_alone_is_the_item_in_a_batch(vocoder: Vocoder, mel: Tensor, refine: int) -> None:
    batch = torch.stack([mel, mel - 0.5, mel.flip(1)])
    together = vocoder(batch, seed=[3, 4, 3], refine=refine)
    for item, (own, seed) in enumerate(zip(batch, [3, 4, 3], strict=True)):
        alone = vocoder(own, seed=seed, refine=refine)
        # Matrix products of other sizes round otherwise; three steps of 16 bits.
        torch.testing.assert_close(together[item], alone, rtol=0, atol=1e-4)
    # One seed for all is the same seed for each, wherever an item stands.
    same = vocoder(batch, seed=3, refine=refine)
    torch.testing.assert_close(same[[0, 2]], together[[0, 2]], rtol=0, atol=1e-4)


def test_sigma(vocoder: Vocoder, mel: Tensor) -> None:
    still = vocoder(mel, sigma=0, refine=0)
    assert torch.equal(still, vocoder(mel, sigma=0, seed=9, refine=0))
    zeros = torch.zeros(1, HOP, mel.shape[1])
    expected = vocoder.flow.decode(zeros, mel[None], sigma=0.0)
    torch.testing.assert_close(still, expected[0].clamp(-1, 1), rtol=0, atol=1e-5)
    quiet, loud = (vocoder(mel, sigma=s, refine=0).std() for s in (0.5, 1.0))
    assert quiet < loud
    assert torch.equal(vocoder(mel), vocoder(mel, sigma=vocoder.config.synthesis.sigma))


def test_refinement_brings_the_mel_closer(vocoder: Vocoder, mel: Tensor) -> None:
    distances = [
        (vocoder.mel(vocoder(mel, refine=steps)) - mel).abs().mean().item() for steps in (0, 1, 4)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert torch.equal(vocoder(mel), vocoder(mel, refine=2))  # the config's default
    assert not torch.equal(vocoder(mel), vocoder(mel, refine=0))


def as_it_may_come(mel: Tensor) -> dict[str, np.ndarray | Tensor]:
    array = mel.numpy()
    locked = array.copy()
    locked.setflags(write=False)
    return {
        "numpy": array,
        "read_only": locked,
        "float64": array.astype(np.float64),
        "big_endian": array.astype(">f4"),
        "reversed": np.ascontiguousarray(array[::-1])[::-1],
        "fortran": np.asfortranarray(array),
        "double": mel.double(),
        "with_gradient": mel.clone().requires_grad_(),
        "strided": mel.repeat_interleave(2, 1)[:, ::2],
    }


def test_arrays_and_tensors_of_any_kind_give_the_same(vocoder: Vocoder, mel: Tensor) -> None:
    expected = vocoder(mel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, given_mel in as_it_may_come(mel).items():
            before = given_mel.copy() if isinstance(given_mel, np.ndarray) else given_mel.clone()
            assert torch.equal(vocoder(given_mel), expected), kind
            assert (given_mel == before).all(), kind


# --- lengths ---


@pytest.mark.parametrize("n_samples", [1, 2, 128, 255, 256, 257, 512, 513, 1023, 1025, 1999, 2000])
def test_resynth_keeps_the_length(vocoder: Vocoder, n_samples: int) -> None:
    samples = 0.1 * torch.sin(torch.arange(n_samples) / 10)
    out = vocoder.resynth(samples)
    assert out.shape == (n_samples,)
    assert torch.isfinite(out).all()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(n_samples=st.integers(1, 2000), refine=st.integers(0, 1))
def test_resynth_keeps_any_length(vocoder: Vocoder, n_samples: int, refine: int) -> None:
    assert vocoder.resynth(np.full(n_samples, 0.01), refine=refine).shape == (n_samples,)


@pytest.mark.parametrize("preset", ["hifigan", "nvidia"])
def test_resynth_is_the_mel_of_whole_hops_and_a_draw(preset: str, audio: Tensor) -> None:
    config = ModelConfig(
        model=FrameGlowConfig(n_levels=0, n_flows=0, encoder_channels=8, encoder_layers=0),
        mel=MEL_PRESETS[preset],
    )
    torch.manual_seed(0)
    vocoder = Vocoder(config, build_flow(config.model, config.mel))
    samples = audio[: 11 * HOP + 7]
    padded = torch.nn.functional.pad(samples, (0, HOP - 7))
    expected = vocoder(vocoder.mel(padded)[:, :12], seed=2)
    assert torch.equal(vocoder.resynth(samples, seed=2), expected[: 11 * HOP + 7])


@pytest.mark.parametrize("rest", [0, 1, 255])
def test_densities_use_whole_hops_and_as_many_frames(
    vocoder: Vocoder, mel: Tensor, audio: Tensor, rest: int
) -> None:
    samples = audio[: 9 * HOP + rest]
    log_prob = vocoder.log_prob(samples, mel)
    assert log_prob.shape == (1,)
    torch.testing.assert_close(log_prob, vocoder.log_prob(audio[: 9 * HOP], mel[:, :9]))
    z = vocoder.encode(samples, mel)
    assert z.shape == (1, HOP, 9)
    torch.testing.assert_close(z, vocoder.encode(audio[: 9 * HOP][None], mel[None, :, :9]))
    vocoder.log_prob(samples, mel[:, :9])
    with pytest.raises(MelMismatchError, match=r"9 whole hops.* 8 frames"):
        vocoder.log_prob(samples, mel[:, :8])


def test_a_draw_is_neither_refined_nor_clipped(vocoder: Vocoder, mel: Tensor) -> None:
    draw = vocoder.draw(mel + 8, seed=3)
    assert draw.abs().max() > 1
    z = 1.0 * vocoder.flow.noise(mel.shape[-1], [3])
    assert torch.equal(draw, vocoder.decode(z, mel + 8).reshape(draw.shape))
    quiet = vocoder.draw(mel - 3)
    assert torch.equal(quiet, vocoder(mel - 3, refine=0))


def test_own_draws_are_likely(vocoder: Vocoder, mel: Tensor) -> None:
    """Far more than the same at ten times the level."""
    batch = torch.stack([mel, mel])
    draws = vocoder.decode(torch.randn(2, HOP, mel.shape[1]), batch)
    log_prob = vocoder.log_prob(draws, batch)
    assert log_prob.shape == (2,)
    assert (log_prob > vocoder.log_prob(10 * draws, batch) + 1).all()


def test_decode_undoes_encode(vocoder: Vocoder, mel: Tensor, audio: Tensor) -> None:
    n_frames = len(audio) // HOP
    z = vocoder.encode(audio, mel)
    decoded = vocoder.decode(z, mel[:, :n_frames])
    assert decoded.shape == (1, n_frames * HOP)
    torch.testing.assert_close(decoded[0], audio[: n_frames * HOP], rtol=0, atol=1e-4)
    as_arrays = vocoder.decode(vocoder.encode(audio.numpy(), mel.numpy()), mel.numpy())
    assert torch.equal(as_arrays, decoded)


@pytest.mark.filterwarnings("ignore:.*were clipped")
def test_a_flow_whose_z_is_finer_than_a_frame() -> None:
    """WaveGlow's z has 8 channels: 32 positions for each frame."""
    config = ModelConfig(
        model=WaveGlowConfig(n_flows=2, n_layers=2, hidden_channels=4), mel=MEL_PRESETS["nvidia"]
    )
    torch.manual_seed(0)
    vocoder = perturb(Vocoder(config, build_flow(config.model, config.mel)))
    audio = torch.from_numpy(make_voice(0.1))
    mel = vocoder.mel(audio)
    n_hops = len(audio) // HOP
    assert mel.shape == (80, n_hops + 1)
    z = vocoder.encode(audio, mel)
    assert z.shape == (1, 8, n_hops * 32)
    again = vocoder.decode(z, mel[:, :n_hops])[0]
    torch.testing.assert_close(again, audio[: n_hops * HOP], rtol=0, atol=1e-4)
    assert vocoder(mel).shape == (len(mel[0]) * HOP,)
    assert vocoder.resynth(audio).shape == audio.shape


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda mel: mel[:79], "this mel has 79 bands, the model takes 80"),
        (lambda mel: mel.T, "bands, the model takes 80; transpose it"),
        (lambda mel: mel[None].transpose(1, 2), "bands, the model takes 80; transpose it"),
        (lambda mel: mel[0], r"\(80, F\) or \(B, 80, F\), not \(\d+,\)"),
        (lambda mel: mel[None, None], r"not \(1, 1, 80, \d+\)"),
        (lambda mel: mel[:, :0], r"empty: \(1, 80, 0\)"),
        (lambda mel: mel[None][:0], r"empty: \(0, 80, \d+\)"),
        (lambda mel: mel * torch.nan, "NaN or infinite"),
        (lambda mel: torch.where(mel == mel.max(), -torch.inf, mel), "NaN or infinite"),
        (lambda mel: mel.double() * 1e300, "NaN or infinite"),
    ],
)
def test_wrong_mels(vocoder: Vocoder, mel: Tensor, audio: Tensor, make, message: str) -> None:
    wrong = make(mel)
    for call in (
        lambda: vocoder(wrong),
        lambda: vocoder(wrong.numpy()),
        lambda: vocoder.log_prob(audio, wrong),
        lambda: vocoder.decode(torch.zeros(1, HOP, 1), wrong),
    ):
        with pytest.raises(MelMismatchError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda audio: audio[:0], "not empty"),
        (lambda audio: audio[None, None], r"\(T,\) or \(B, T\)"),
        (lambda audio: audio[0], r"\(T,\) or \(B, T\)"),
        (lambda audio: audio * torch.nan, "NaN or infinite"),
        (lambda audio: audio / 0, "NaN or infinite"),
    ],
)
def test_wrong_audio(vocoder: Vocoder, mel: Tensor, audio: Tensor, make, message: str) -> None:
    wrong = make(audio)
    for call in (
        lambda: vocoder.resynth(wrong),
        lambda: vocoder.mel(wrong),
        lambda: vocoder.encode(wrong, mel),
    ):
        with pytest.raises(AudioError, match=message):
            call()


def test_audio_that_does_not_fit(vocoder: Vocoder, mel: Tensor, audio: Tensor) -> None:
    with pytest.raises(AudioError, match="255 samples is shorter than one hop, 256"):
        vocoder.log_prob(audio[:255], mel)
    with pytest.raises(AudioError, match=r"one waveform \(T,\), not \(1, "):
        vocoder.resynth(audio[None])
    with pytest.raises(MelMismatchError, match=r"in 2 items; .* in 1"):
        vocoder.encode(audio.expand(2, -1), mel)
    with pytest.raises(MelMismatchError, match=r"z is \(1, 256, 3\); this mel needs \(1, 256, 4\)"):
        vocoder.decode(torch.zeros(1, 256, 3), mel[:, :4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -0.1}, "sigma -0.1 is out of range"),
        ({"sigma": 11}, "sigma 11 is out of range"),
        ({"sigma": float("nan")}, "sigma nan is out of range"),
        ({"refine": -1}, "refine -1 is out of range"),
        ({"refine": 65}, "refine 65 is out of range"),
        ({"seed": [1, 2]}, "2 seeds for 1 mels"),
        ({"seed": []}, "0 seeds for 1 mels"),
    ],
)
def test_wrong_options(vocoder: Vocoder, mel: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vocoder(mel, **options)


# --- warnings ---


@pytest.mark.parametrize("change", [lambda m: m * 20 / np.log(10), torch.exp])
def test_a_foreign_mel_is_refused_wherever_it_stands(vocoder: Vocoder, mel: Tensor, change) -> None:
    with pytest.raises(MelMismatchError, match=r"this mel.*--convention"):
        vocoder(torch.stack([mel, change(mel)]))
    vocoder(change(mel), convention="native", refine=0)


def test_a_native_mel_is_not_warned_of(vocoder: Vocoder, mel: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vocoder(mel)


def test_without_a_known_range_nothing_is_called_foreign(vocoder: Vocoder, mel: Tensor) -> None:
    config = vocoder.config.model_copy(update={"provenance": Provenance()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Vocoder(config, vocoder.flow)(20 * mel)
    assert not any("looks" in str(warning.message) for warning in caught)


def test_clipping_is_warned_of_and_stays_in_range(vocoder: Vocoder) -> None:
    loud = torch.full((80, 4), 1.9)
    loud[-1] = -9.0
    with pytest.warns(VocoderWarning, match=r"\d % of the samples were clipped") as caught:
        out = vocoder(loud, refine=0)
    assert out.abs().max() == 1
    assert [w.filename for w in caught] == [__file__]


# --- loading ---


def test_load_takes_names_folders_and_runs(tiny_model: Path, tmp_path: Path) -> None:
    vocoder = load(str(tiny_model))
    assert (vocoder.sample_rate, vocoder.hop_length) == (22050, HOP)
    assert vocoder.mel_config == MEL_PRESETS["hifigan"]
    assert vocoder.device == torch.device("cpu")
    assert not vocoder.flow.training
    assert model_folder(tiny_model) == tiny_model
    for name in list_models():
        assert model_folder(name).name == name


@pytest.mark.parametrize("name", ["no-such-model", "no/such/folder"])
def test_unknown_models(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no model '{name}': give a folder, or one of"):
        load(name)


def test_a_file_is_no_model(tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="waveflow convert"):
        load(tiny_model / "model.safetensors")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable .*manifest\.json"):
        load(tmp_path)


def test_a_config_whose_sizes_disagree() -> None:
    config = WaveGlowConfig(n_mels=40, n_flows=1, n_layers=1, hidden_channels=4)
    with pytest.raises(ConfigError, match="n_mels 40 and hop_length 256, its mel 80 and 256"):
        build_flow(config, MEL_PRESETS["nvidia"])


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(tiny_model: Path, mel: Tensor, device: str) -> None:
    vocoder = load(tiny_model)
    before = vocoder(mel)
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used") as caught:
        vocoder.to(device)
    assert "\n" not in str(caught.value)
    assert torch.equal(vocoder(mel), before)
    assert torch.equal(vocoder.to("cpu")(mel), before)


def test_training_and_preparing_again_do_not_change_it(tiny_model: Path, mel: Tensor) -> None:
    vocoder = load(tiny_model)
    before = vocoder(mel)
    vocoder.flow.train()
    vocoder.flow.eval()
    assert torch.equal(vocoder(mel), before)


def test_the_configs_sampling_is_the_default(tiny_model: Path, mel: Tensor) -> None:
    vocoder = load(tiny_model)
    synthesis = SynthesisConfig(sigma=0.5, refine_steps=1, refine_power=1.5, refine_momentum=0.5)
    config = vocoder.config.model_copy(update={"synthesis": synthesis})
    other = Vocoder(config, vocoder.flow)
    assert torch.equal(other(mel), other(mel, sigma=0.5, refine=1))
    assert not torch.equal(other(mel), vocoder(mel, sigma=0.5, refine=1))


# --- the package ---


# --- what runs it ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "auto"])
def test_precisions(tiny_model: Path, vocoder: Vocoder, mel: Tensor, precision: str) -> None:
    if precision == "int8":
        pytest.importorskip("openvino")
    other = load(tiny_model, precision=precision)  # type: ignore[arg-type]
    other.flow.load_state_dict(vocoder.flow.state_dict())
    plain = vocoder.flow.decode(vocoder.flow.noise(8, [0]), mel[None, :, :8])
    audio = other.draw(mel[:, :8])
    error = (audio - plain[0]).square().mean().sqrt() / plain.square().mean().sqrt()
    # 8 bits of mantissa, or of range; float32 to 110 dB.
    assert error < (3e-6 if precision == "float32" else 0.1)


def test_what_runs_it_is_made_anew_when_weights_change(tiny_model: Path, mel: Tensor) -> None:
    vocoder = load(tiny_model)
    before, decoder = vocoder.draw(mel), vocoder.decoder
    assert vocoder.decoder is decoder
    perturb(vocoder)
    after = vocoder.draw(mel)
    assert vocoder.decoder is not decoder
    assert (after - before).abs().max() > 1e-3
    plain = Vocoder(vocoder.config, vocoder.flow, lambda flow: flow.decode)
    assert torch.allclose(after, plain.draw(mel), atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "float64", "nonsense"])
def test_precisions_that_are_not_to_be_had(tiny_model: Path, mel: Tensor, precision: str) -> None:
    with pytest.raises(ConfigError, match=precision):
        load(tiny_model, precision=precision)(mel)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "gain", "dtype", "level"),
    [
        ("auto", 1.2, torch.float32, "INFO"),
        ("auto", 1.4, torch.bfloat16, "INFO"),
        # A user who asked for bfloat16 is told where it is not what runs.
        ("bfloat16", 0.6, torch.float32, "WARNING"),
        ("bfloat16", 0.8, torch.bfloat16, "INFO"),
    ],
)
def test_bfloat16_where_it_pays(
    tiny_model: Path,
    mel: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: Literal["auto", "bfloat16"],
    gain: float,
    dtype: torch.dtype,
    level: str,
) -> None:
    times = iter([gain, 1.0])
    monkeypatch.setattr(engine_decoder, "_seconds", lambda *_: next(times))
    vocoder = load(tiny_model, precision=precision)
    with caplog.at_level("INFO", logger="waveflow.engine"):
        chosen = vocoder.decoder
    expected = TorchDecoder(vocoder.flow, dtype)
    noise = vocoder.flow.noise(mel.shape[1], [0])
    assert torch.equal(chosen(noise, mel[None]), expected(noise, mel[None]))
    (record,) = caplog.records
    assert record.levelname == level
    assert f"runs in {str(dtype).removeprefix('torch.')}: " in record.getMessage()
    assert f"{gain} times" in record.getMessage()


@pytest.mark.parametrize(
    ("largest", "gain", "runs_in"),
    [(127, None, "int8"), (63, 0.8, "float32"), (63, 1.1, "int8")],
    ids=["VNNI", "slower", "faster"],
)
def test_int8_without_8_bit_products_is_refused_where_it_is_slower(
    tiny_model: Path,
    mel: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    largest: int,
    gain: float | None,
    runs_in: str,
) -> None:
    pytest.importorskip("openvino")
    times = iter([] if gain is None else [gain, 1.0])
    monkeypatch.setattr(engine_decoder, "_seconds", lambda *_: next(times))
    monkeypatch.setattr(engine_decoder, "largest_weight", lambda: largest)
    vocoder = load(tiny_model, precision="int8")
    with caplog.at_level("WARNING", logger="waveflow.engine"):
        chosen = vocoder.decoder
    assert isinstance(chosen, Int8Decoder) == (runs_in == "int8")
    # A user who asked for int8 is told that it is not what runs.
    assert bool(caplog.records) == (runs_in != "int8")
    noise = vocoder.flow.noise(mel.shape[1], [0])
    plain = vocoder.flow.decode(noise, mel[None])
    assert (chosen(noise, mel[None]) - plain).abs().max() < 0.1 * plain.abs().max()


def test_loading_in_inference_mode_and_copies(tiny_model: Path, mel: Tensor) -> None:
    with torch.inference_mode():
        vocoder = load(tiny_model)
        audio = vocoder(mel)
    assert torch.equal(copy.deepcopy(vocoder)(mel), audio)
    assert torch.equal(pickle.loads(pickle.dumps(load(tiny_model)))(mel), audio)


def test_denoising_takes_the_models_own_bias(vocoder: Vocoder, audio: Tensor) -> None:
    assert vocoder.denoiser() is vocoder.denoiser("silence")
    assert vocoder.denoiser("zeros") is not vocoder.denoiser()
    untouched = vocoder.denoise(audio, 0.0)
    assert torch.allclose(untouched, audio, atol=1e-5)
    assert (vocoder.denoise(audio, 1.0, "zeros") - audio).abs().max() > 1e-4


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, waveflow\n"
        "dir(waveflow), waveflow.__version__\n"
        "print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])\n"
        "waveflow.list_models()\n"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])\n"
        "waveflow.load\n"
        "print('torch' in sys.modules, 'torchaudio' in sys.modules, 'typer' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "[]", "True False False"]


def test_public_names() -> None:
    assert waveflow.load is load
    assert waveflow.Vocoder is Vocoder
    assert waveflow.MelConfig is MelConfig
    assert all(getattr(waveflow, name) is not None for name in waveflow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = waveflow.nothing


def test_a_mel_that_gives_no_audio(vocoder: Vocoder, mel: Tensor) -> None:
    wild = torch.full_like(mel, 1e30)
    message = r"1e\+30 to 1e\+30, gives samples"
    with pytest.raises(MelMismatchError, match=message):
        vocoder(wild)
    with pytest.raises(MelMismatchError, match=message):
        list(vocoder.stream([wild]))
