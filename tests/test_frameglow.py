"""FrameGlow: its density, its start as the base, batches, the harmonic source, the pitch head."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from waveflow.audio.filters import mel_center_hz
from waveflow.audio.mel import MEL_PRESETS, MelConfig, MelSpectrogram
from waveflow.bijections import InvertibleConv1x1, LappedSqueeze
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig, frameglow
from waveflow.models.frameglow.conditioner import IN_PHASE, UNVOICED_POWER, FrameConditioner
from waveflow.models.frameglow.layout import FeatureLayout
from waveflow.models.frameglow.networks import FrameNetwork, LevelNetwork, MelLevelNetwork
from waveflow.models.registry import build_flow
from waveflow.nn.frame import ConvNeXt, GatedStack
from waveflow.nn.minimum_phase import minimum_phase, turned
from waveflow.nn.phase_path import MAX_STEP, N_OFFSETS, best_path
from waveflow.nn.pitch import CENTS_PER_CLASS, LOWEST_HZ, N_CLASSES, PitchHead
from waveflow.nn.source import HarmonicSource
from waveflow.padding import hold_last

HIFIGAN = MEL_PRESETS["hifigan"]
TINY_MEL = MelConfig(
    sample_rate=8000, n_fft=64, hop_length=16, win_length=64, n_mels=8, f_max=4000.0
)
TINY = FrameGlowConfig(
    n_levels=2,
    n_flows=2,
    hidden_channels=8,
    dilations=(1, 2),
    encoder_channels=8,
    encoder_layers=1,
)
CONVNEXT = TINY.model_copy(update={"network": "convnext"})
NO_PATH = TINY.model_copy(update={"phase_path": False})
VARIANTS = ["wavenet", "convnext", "minimum phase"]
MINIMUM_PHASE = TINY.model_copy(update={"minimum_phase": True})


def perturbed(flow: Flow, amount: float = 0.1) -> Flow:
    """A flow in evaluation mode that is no longer its base."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * noise.to(parameter.dtype))
    return flow.eval()


def tiny(config: FrameGlowConfig = TINY, amount: float = 0.1) -> Flow:
    torch.manual_seed(0)
    return perturbed(build_flow(config, TINY_MEL).double(), amount)


def tiny_batch(n_frames: int, n_items: int = 2) -> tuple[Tensor, Tensor]:
    """Audio (B, T) and mels (B, M, F) of the level of speech, float64."""
    generator = torch.Generator().manual_seed(2)
    audio = 0.1 * torch.randn(n_items, 16 * n_frames, generator=generator, dtype=torch.float64)
    mel = -4 + torch.randn(n_items, 8, n_frames, generator=generator, dtype=torch.float64)
    return audio, mel


# --- density ---


@pytest.mark.parametrize("network", ["wavenet", "convnext"])
def test_log_likelihood_is_that_of_the_jacobian(network: str) -> None:
    flow = tiny(NO_PATH.model_copy(update={"network": network, "minimum_phase": True}))
    assert not flow.is_bound
    audio, mel = tiny_batch(4)
    log_prob = flow(audio, mel)
    for item in range(2):
        own_mel = mel[item : item + 1]

        def encode(x: Tensor, own_mel: Tensor = own_mel) -> Tensor:
            return flow.encode(x[None], own_mel).flatten()

        jacobian = torch.autograd.functional.jacobian(encode, audio[item])
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(encode(audio[item])).sum()
        expected = (normal + torch.linalg.slogdet(jacobian)[1]) / audio.shape[1]
        torch.testing.assert_close(log_prob[item], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("config", [TINY, CONVNEXT, MINIMUM_PHASE], ids=VARIANTS)
@torch.no_grad()
def test_round_trips_in_float64(config: FrameGlowConfig) -> None:
    flow = tiny(config)
    audio, mel = tiny_batch(7)
    z = flow.encode(audio, mel)
    assert z.shape == (2, 16, 7)
    torch.testing.assert_close(flow.decode(z, mel), audio, rtol=0, atol=1e-10)
    z = torch.randn_like(z)
    torch.testing.assert_close(flow.encode(flow.decode(z, mel), mel), z, rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def real_flow() -> Flow:
    """At the shipped mel, narrow, and as far from its base as training takes it."""
    torch.manual_seed(0)
    config = FrameGlowConfig(hidden_channels=32, encoder_channels=32, encoder_layers=2)
    return perturbed(build_flow(config, HIFIGAN), 0.02).eval()


@pytest.mark.parametrize("clip", ["LJ001_0002", "LJ001_0008"])
@torch.no_grad()
def test_round_trip_of_speech_in_float32(clip: str, real_flow: Flow) -> None:
    fixtures = np.load(Path(__file__).parent / "fixtures" / "mel.npz", allow_pickle=False)
    samples = torch.from_numpy(fixtures[f"{clip}_audio_int16"]).float() / 32768
    audio = samples[: len(samples) // 256 * 256][None]
    mel = MelSpectrogram(HIFIGAN)(audio)
    z = real_flow.encode(audio, mel)
    base = build_flow(FrameGlowConfig(n_levels=0, n_flows=0), HIFIGAN).eval()
    assert (z - base.encode(audio, mel)).std() > 0.3
    torch.testing.assert_close(real_flow.decode(z, mel), audio, rtol=0, atol=1e-4)


# --- composition ---


def test_number_of_parameters() -> None:
    """2.7 million with the default sizes, 3.4 million as shipped: 7 MB in float16."""

    def count(config: FrameGlowConfig) -> int:
        return sum(p.numel() for p in build_flow(config, HIFIGAN).parameters())

    assert count(FrameGlowConfig(n_levels=0)) / 1e6 == pytest.approx(2.8, abs=0.35)
    assert count(FrameGlowConfig(hidden_channels=128)) * 2 < 20e6
    levels = count(FrameGlowConfig()) - count(FrameGlowConfig(n_levels=0))
    # 128 + 1 inputs to five numbers for each bin, and to two for each of 64 + 32 + 16 of them.
    assert levels == 129 * (5 * 256 + 2 * (64 + 32 + 16))


@torch.no_grad()
def test_it_starts_as_its_base() -> None:
    """u = y exp(-(envelope + 0.2)): couplings and levels are the identity until trained."""
    torch.manual_seed(0)
    flow = build_flow(NO_PATH, TINY_MEL).double().eval()
    audio, mel = tiny_batch(6)
    y, _ = LappedSqueeze(16)(audio[:, None])
    envelope = mel.transpose(1, 2) @ flow.conditioner.band_to_bin
    level = envelope.transpose(1, 2) + 0.2
    torch.testing.assert_close(flow.encode(audio, mel), y * (-level).exp(), rtol=0, atol=1e-6)
    gaussian = torch.distributions.Normal(0.0, level.exp()).log_prob(y).sum((1, 2)) / 96
    torch.testing.assert_close(flow(audio, mel), gaussian, rtol=0, atol=1e-6)


@torch.no_grad()
def test_without_levels_and_flows_it_is_the_base_alone() -> None:
    base = TINY.model_copy(update={"n_levels": 0, "n_flows": 0})
    torch.manual_seed(0)
    alone = build_flow(base, TINY_MEL).double().eval()
    assert not any(isinstance(m, InvertibleConv1x1 | FrameNetwork) for m in alone.modules())
    torch.manual_seed(0)
    whole = build_flow(TINY, TINY_MEL).double().eval()
    audio, mel = tiny_batch(5)
    shared = {k: v for k, v in whole.state_dict().items() if k in alone.state_dict()}
    alone.load_state_dict(shared)
    torch.testing.assert_close(alone(audio, mel), whole(audio, mel), rtol=0, atol=1e-12)


def test_every_weight_but_the_pitch_heads_gets_a_gradient() -> None:
    flow = tiny().train()
    audio, mel = tiny_batch(6)
    flow(audio, mel).sum().backward()
    dead = {n for n, p in flow.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead == {n for n, _ in flow.named_parameters() if n.startswith("conditioner.pitch.")}


def test_the_envelope_interpolates_between_the_bands_centres() -> None:
    """A mel that is linear in Hz stays so between the outer bands, and is held beyond them."""
    from waveflow.audio.filters import mel_center_hz

    flow = build_flow(FrameGlowConfig(n_levels=0, n_flows=0), HIFIGAN)
    centres = torch.as_tensor(mel_center_hz(HIFIGAN))
    bins = (torch.arange(256) + 0.5) / 256 * 11025
    envelope = (centres / 1000).float() @ flow.conditioner.band_to_bin
    expected = (bins.clamp(centres[0], centres[-1]) / 1000).float()
    torch.testing.assert_close(envelope, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("hop", "n_levels"), [(20, 3), (15, 0), (24, 4)])
def test_hops_that_cannot_be_halved_are_refused(hop: int, n_levels: int) -> None:
    mel = TINY_MEL.model_copy(update={"hop_length": hop})
    with pytest.raises(ConfigError, match=f"hop_length {hop} .* n_levels {n_levels}"):
        frameglow(TINY.model_copy(update={"n_levels": n_levels}), mel)


# --- batches of unequal lengths ---


@pytest.mark.parametrize("config", [TINY, CONVNEXT, MINIMUM_PHASE], ids=VARIANTS)
@pytest.mark.parametrize("lengths", [[9, 4, 1], [3, 9, 8]])
@torch.no_grad()
def test_padded_items_get_what_they_get_alone(config: FrameGlowConfig, lengths: list[int]) -> None:
    # In float64, where what is left of a difference could only be a leak.
    flow, (audio, mel) = tiny(config), tiny_batch(9, 3)
    z = torch.randn(3, 16, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for item, n in enumerate(lengths):  # what lies beyond an item's end is loud
        audio[item, n * 16 :], mel[item, :, n:], z[item, :, n:] = 0.9, 2.0, 5.0
    n_frames = torch.tensor(lengths)
    log_prob = flow(audio, mel, n_frames)
    encoded, decoded = flow.encode(audio, mel, n_frames), flow.decode(z, mel, n_frames)
    for i, n in enumerate(lengths):
        own_audio, own_mel = audio[i : i + 1, : n * 16], mel[i : i + 1, :, :n]
        own_z = flow.encode(own_audio, own_mel)[0]
        own_decoded = flow.decode(z[i : i + 1, :, :n], own_mel)[0]
        own_log_prob = flow(own_audio, own_mel)[0]
        torch.testing.assert_close(log_prob[i], own_log_prob, rtol=0, atol=1e-9)
        torch.testing.assert_close(encoded[i, :, :n], own_z, rtol=0, atol=1e-9)
        torch.testing.assert_close(decoded[i, : n * 16], own_decoded, rtol=0, atol=1e-9)
        assert not decoded[i, n * 16 :].any()


def test_hold_last_keeps_the_last_valid_value() -> None:
    f0 = torch.arange(1.0, 9.0).reshape(2, 4)
    assert torch.equal(hold_last(f0, None), f0)
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    assert hold_last(f0, mask).tolist() == [[1, 2, 2, 2], [5, 6, 7, 8]]
    # An item without frames has nothing to hold, and must not fail.
    assert torch.isfinite(hold_last(f0, torch.zeros(2, 4))).all()


# --- the source in the features ---


LAYOUT = FeatureLayout(TINY, TINY_MEL)
N_FEATURES = 8 + 4 * 16 + 8 + 1


def parts(flow: Flow, mel: Tensor) -> list[Tensor]:
    features = flow.conditioner(mel).features
    assert features.shape[1] == N_FEATURES
    return LAYOUT.read(features, "h", "source", "quadrature", "level", "mel")


@torch.no_grad()
def test_source_phase_is_fixed_in_evaluation_and_random_in_training() -> None:
    flow, (_, mel) = tiny(), tiny_batch(6)
    assert all(map(torch.equal, parts(flow, mel), parts(flow, mel)))
    flow.train()
    torch.manual_seed(0)
    h, source, quadrature, level, own_mel = parts(flow, mel)
    again_h, again_source, again_quadrature, again_level, _ = parts(flow, mel)
    assert torch.equal(h, again_h)
    assert torch.equal(level, again_level)
    assert torch.equal(own_mel.transpose(1, 2), mel)
    assert (source - again_source).abs().max() > 0.1
    assert (quadrature - again_quadrature).abs().max() > 0.1
    assert not torch.equal(source[0], source[1])


@torch.no_grad()
def test_unvoiced_frames_keep_more_of_the_noise() -> None:
    flow, (_, mel) = tiny(), tiny_batch(6)
    flow.conditioner.pitch.leave.weight.zero_()
    z = flow.noise(6, [0, 1]).double()

    def tempered(sigma: float, voicing_logit: float) -> Tensor:
        flow.conditioner.pitch.leave.bias[N_CLASSES] = voicing_logit
        return flow.conditioner.tempered(z, flow.condition(mel), sigma)[0]

    torch.testing.assert_close(tempered(0.2, 40.0), 0.2 * z)
    torch.testing.assert_close(tempered(0.2, -40.0), 0.2**UNVOICED_POWER * z)
    half_voiced = math.sqrt(0.2 * 0.2**UNVOICED_POWER)
    torch.testing.assert_close(tempered(0.2, 0.0), half_voiced * z)
    assert torch.equal(tempered(1.0, 0.0), z)  # a sample of the density
    assert not tempered(0.0, 0.0).any()
    quiet, louder = flow.conditioner.tempered(z, flow.condition(mel), 0.2)
    audio = flow.decode(z, mel, sigma=0.2)
    torch.testing.assert_close(audio, flow.bijection.inverse(quiet, louder)[0][:, 0])


@torch.no_grad()
def test_levels_make_up_for_the_noise_that_a_low_sigma_takes() -> None:
    flow, (_, mel) = tiny(TINY.model_copy(update={"noise_share": True})), tiny_batch(6)
    conditioner = flow.conditioner
    assert isinstance(conditioner, FrameConditioner)
    conditioner.pitch.leave.weight.zero_()
    noise = conditioner.noise.coefficients
    # sigmoid(1 - 2 cos(pi x)): more noise in high bands, whatever h is.
    noise.weight.zero_()
    noise.bias.copy_(torch.tensor([1.0, -2.0, 0, 0, 0, 0, 0, 0]))
    z = flow.noise(6, [0, 1]).double()

    def louder(sigma: float, voicing_logit: float) -> dict[str, Tensor]:
        conditioner.pitch.leave.bias[N_CLASSES] = voicing_logit
        cond = flow.condition(mel)
        difference = conditioner.tempered(z, cond, sigma)[1].features - cond.features
        return {name: difference[:, part] for name, part in conditioner.layout.slices.items()}

    assert not any(part.any() for part in louder(1.0, 0.0).values())
    voiced, unvoiced = louder(0.2, 40.0), louder(0.2, -40.0)
    hertz = (np.arange(16) + 0.5) * 4000 / 16
    bands = (np.arange(8) + 0.5) / 8
    of_bins = np.interp(hertz, mel_center_hz(TINY_MEL), bands)
    # Energy s of noise becomes s scale^2, and the rest stays.
    for part, places in (("level", of_bins), ("mel", bands)):
        share = torch.from_numpy(1 / (1 + np.exp(2 * np.cos(math.pi * places) - 1)))
        for found, energy in ((voiced, 0.04), (unvoiced, 0.04**UNVOICED_POWER)):
            expected = (1 - share * (1 - energy)).log() / -2
            expected = expected.reshape(1, -1, 1).expand_as(found[part])
            torch.testing.assert_close(found[part], expected, rtol=0, atol=1e-6)
    assert not any(voiced[name].any() for name in ("h", "source", "quadrature", "shift", "voicing"))
    # What is heard changes it.
    noise.weight[0, :8] = 1.0
    assert louder(0.2, 40.0)["level"].std(2).min() > 1e-3
    # All of a frame is noise, and none of it is drawn.
    noise.bias[0] = 1000.0
    assert louder(0.0, 40.0)["level"].max().item() == pytest.approx(math.log(100) / 2)
    # Files of before say nothing about noise: their levels stay.
    flow = tiny()
    cond = flow.condition(mel)
    assert flow.conditioner.tempered(z, cond, 0.2)[1] is cond


@torch.no_grad()
def test_source_and_quadrature_are_the_transforms_of_one_pulse_train() -> None:
    flow, (_, mel) = tiny(), tiny_batch(6)
    conditioner = flow.conditioner
    assert isinstance(conditioner, FrameConditioner)
    _, source, quadrature, *_ = parts(flow, mel)
    f0 = PitchHead.f0_hz(conditioner.pitch(FrameConditioner.normalise(mel))[0])
    pulses = HarmonicSource(8000, 16)(f0)
    for part, transform in ((source, False), (quadrature, True)):
        back, _ = LappedSqueeze(16, transform).inverse(part.transpose(1, 2))
        torch.testing.assert_close(back[:, 0], pulses, rtol=0, atol=1e-10)


def resonance(f: np.ndarray) -> np.ndarray:
    """A filter of minimum phase with a formant at 2 kHz, at frequencies in Hz."""
    pole = 0.9 * np.exp(2j * math.pi * 2000 / 22050)
    delay = np.exp(-2j * math.pi * f / 22050)
    return 1 / ((1 - pole * delay) * (1 - pole.conj() * delay))


WIDE = MEL_PRESETS["bigvgan-22k"]  # its bands reach the Nyquist frequency
BINS_HZ = (np.arange(256) + 0.5) / 256 * 11025


def test_the_minimum_phase_of_a_mel_is_that_of_the_filter_with_its_envelope() -> None:
    mel = np.log(np.abs(resonance(mel_center_hz(WIDE))))
    phase = mel @ minimum_phase(WIDE, 256).numpy()
    # Bands, and a cepstrum of 3 ms, blur the resonance a little: measured 0.033.
    assert np.abs(phase - np.angle(resonance(BINS_HZ))).max() < 0.045
    louder = (mel + 3) @ minimum_phase(WIDE, 256).numpy()
    np.testing.assert_allclose(louder, phase, atol=1e-5)  # the level has no phase
    energy = WIDE.model_copy(update={"power": 2.0})
    np.testing.assert_allclose(2 * mel @ minimum_phase(energy, 256).numpy(), phase, atol=1e-5)


@pytest.mark.parametrize(("milliseconds", "share"), [(0.5, 0.933), (1.5, 0.5), (4, 0.0)])
def test_a_cepstrum_fades_out_before_the_pitch(milliseconds: float, share: float) -> None:
    """Of a ripple over frequency, one line of the cepstrum; bands as dense as its grid."""
    config = WIDE.model_copy(update={"n_mels": 2048, "mel_scale": "htk"})
    delay = round(milliseconds / 1000 * 22050) / 22050
    mel = np.cos(2 * math.pi * delay * mel_center_hz(config))
    phase = mel @ minimum_phase(config, 256).numpy()
    expected = -share * np.sin(2 * math.pi * delay * BINS_HZ)
    assert np.abs(phase - expected)[8:-8].max() < 0.03


def filtered(signal: Tensor) -> Tensor:
    """Audio (..., T) behind the all-pass filter with the phase of `resonance`, in float64."""
    spectrum = resonance(np.fft.rfftfreq(signal.shape[-1], 1 / 22050))
    all_pass = torch.from_numpy(spectrum / np.abs(spectrum))
    return torch.fft.irfft(torch.fft.rfft(signal.double()) * all_pass, signal.shape[-1])


def lapped(signal: Tensor) -> list[Tensor]:
    """The two transforms (B, L, 256) of audio (B, T)."""
    both = LappedSqueeze(256), LappedSqueeze(256, quadrature=True)
    return [transform.forward(signal[:, None])[0].transpose(1, 2) for transform in both]


def test_a_turn_of_lapped_bins_is_a_filter() -> None:
    noise = torch.randn(1, 256 * 20, generator=torch.Generator().manual_seed(0)).double()
    phase = torch.from_numpy(np.angle(resonance(BINS_HZ))).expand(1, 20, -1)
    parts = lapped(noise)
    for part, other in zip(turned(*parts, phase), lapped(filtered(noise)), strict=True):
        error = (part - other)[:, 1:-1]  # the ends see beyond the signal
        assert error.square().mean() < 1e-3 * other.square().mean()  # measured 1.5e-4
    back = turned(*turned(*parts, phase), -phase)
    torch.testing.assert_close(back, tuple(parts))


@torch.no_grad()
def test_the_source_passes_a_filter_with_the_mels_envelope() -> None:
    torch.manual_seed(0)
    mel = torch.from_numpy(np.log(np.abs(resonance(mel_center_hz(WIDE))))).float()
    mel = mel[None, :, None].expand(1, -1, 20)
    pulses = HarmonicSource(22050, 256)(torch.full((1, 20), 120.0))
    for minimum, audio in ((True, filtered(pulses).float()), (False, pulses)):
        conditioner = build_flow(FrameGlowConfig(minimum_phase=minimum), WIDE).eval().conditioner
        assert isinstance(conditioner, FrameConditioner)
        read = conditioner._read(mel, None)._replace(f0=torch.full((1, 20), 120.0))
        features = conditioner._condition(read, mel, None, (None, None)).features
        found = conditioner.layout.read(features, "source", "quadrature")
        for part, other in zip(found, lapped(audio), strict=True):
            error = (part - other)[:, 2:-2]
            assert error.square().mean() < 0.01 * other.square().mean()


# --- reach of the networks ---


def affected(network: torch.nn.Module, passive: Tensor, features: Tensor, place: int) -> Tensor:
    """Where (C, L) the output changes with all passive channels at one frame."""
    other = passive.clone()
    other[:, :, place] += 1.0
    return (network(other, features) - network(passive, features))[0].abs() > 1e-9


@torch.no_grad()
def test_coupling_networks_reach_as_far_as_their_body() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, N_FEATURES, 41, dtype=torch.float64)
    passive = torch.randn(1, 8, 41, dtype=torch.float64)
    for kind, reach in (("wavenet", 7), ("convnext", 9)):
        config = TINY.model_copy(update={"network": kind, "dilations": (1, 2, 4)})
        network = FrameNetwork(LAYOUT, config, odd_is_active=True).double()
        torch.nn.init.normal_(network.leave.weight)
        frames = affected(network, passive, features, 20).any(0).nonzero().flatten()
        assert (frames.min(), frames.max()) == (20 - reach, 20 + reach)


@torch.no_grad()
def test_levels_look_at_four_bins_in_three_frames() -> None:
    """The even bins 2i - 2, 2i, 2i + 2, 2i + 4 around the odd bin 2i + 1."""
    torch.manual_seed(0)
    network = LevelNetwork(LAYOUT, 8).double()
    torch.nn.init.normal_(network.slope_and_offset.weight)
    features = torch.randn(1, N_FEATURES, 9, dtype=torch.float64)
    passive = torch.randn(1, 8, 9, dtype=torch.float64)
    other = passive.clone()
    other[:, 4, 5] += 1.0
    difference = (network(other, features) - network(passive, features))[0]
    shift, log_scale = difference.chunk(2)
    assert not shift.any()
    changed = log_scale.abs() > 1e-9
    assert changed.any(1).nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert changed.any(0).nonzero().flatten().tolist() == [4, 5, 6]


def level_coupling(odd_is_active: bool) -> tuple[MelLevelNetwork, Flow, Tensor]:
    """A network that answers with half the logarithm of the missing energy itself."""
    torch.manual_seed(0)
    flow = build_flow(FrameGlowConfig(), HIFIGAN).eval()
    network = MelLevelNetwork(LAYOUT_OF_SPEECH, HIFIGAN, odd_is_active)
    network.slopes.bias.data[128:256] = 1.0
    return network, flow, flow.bijection[1]


LAYOUT_OF_SPEECH = FeatureLayout(FrameGlowConfig(), HIFIGAN)


@pytest.mark.parametrize("odd_is_active", [True, False])
@torch.no_grad()
def test_levels_hear_what_the_passive_bins_leave_of_the_mel(odd_is_active: bool) -> None:
    """Noise with its own mel: half of the energy is missing. With less of it, more is missing."""
    network, flow, base = level_coupling(odd_is_active)
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(1, 256 * 40, generator=generator)
    mel = MelSpectrogram(HIFIGAN)(audio)
    cond = flow.condition(mel)
    u, _ = base(LappedSqueeze(256)(audio[:, None])[0], cond)
    passive = u[:, network.passive]
    # Bins up to 8 kHz, where the mel has bands, and frames that touch no edge.
    heard = {
        gain: network(gain * passive, cond.features)[:, 128:220, 4:-4].mean().item()
        for gain in (0.0, 0.5, 1.0, 3.0)
    }
    assert heard[1.0] == pytest.approx(0.0, abs=0.1)
    # Without any passive signal all is missing: log sqrt 2.
    assert heard[0.0] == pytest.approx(0.5 * math.log(2), abs=1e-3)
    # A quarter of a half is there: 7/8 are missing.
    assert heard[0.5] == pytest.approx(0.5 * math.log(7 / 4), abs=0.03)
    assert heard[3.0] < -1.0


@torch.no_grad()
def test_levels_that_hear_the_mel_look_no_further_than_they_say() -> None:
    network, flow, _ = level_coupling(True)
    mel = MelSpectrogram(HIFIGAN)(0.1 * torch.randn(1, 256 * 41))
    features = flow.condition(mel).features
    frames = affected(network, torch.randn(1, 128, 41), features, 20).any(0).nonzero().flatten()
    assert frames.min() >= 20 - network.context.right
    assert frames.max() <= 20 + network.context.left
    assert 4 <= len(frames) <= 9


# --- the path of the phase ---


def walk_with(steps: list[int], strength: float) -> Tensor:
    """Scores (1, L, 64) that speak for one walk from offset 60 on."""
    places = 60 + torch.tensor([0, *steps]).cumsum(0)
    scores = torch.zeros(1, len(places), N_OFFSETS)
    scores[0, torch.arange(len(places)), places % N_OFFSETS] = strength
    return scores


def test_the_best_path_is_the_most_likely_of_all() -> None:
    """Against every walk of four frames, by score and prior."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, 4, N_OFFSETS, generator=generator)
    path = best_path(scores)
    steps = torch.arange(-MAX_STEP, MAX_STEP + 1)
    prior = (-0.5 * steps.double().square()).log_softmax(0)
    start = torch.arange(N_OFFSETS)
    total = scores[0, 0].double().reshape(-1, 1, 1, 1)
    place = start.reshape(-1, 1, 1, 1)
    for frame, shape in ((1, (-1, 1, 1)), (2, (-1, 1)), (3, (-1,))):
        place = place + steps.reshape(shape)
        total = total + scores[0, frame].double()[place % N_OFFSETS] + prior.reshape(shape)
    best = np.unravel_index(int(total.argmax()), total.shape)
    walk = start[best[0]] + torch.tensor([0, *(int(steps[i]) for i in best[1:])]).cumsum(0)
    smooth = torch.cat([walk[:1], walk, walk[-1:]]).double().unfold(0, 3, 1).mean(1)
    torch.testing.assert_close(path.cycles[0], (smooth + 0.5) / N_OFFSETS)
    expected = sum(prior[i] for i in best[1:]) - math.log(N_OFFSETS)
    torch.testing.assert_close(path.log_prob.sum(), torch.as_tensor(expected))


def test_a_path_goes_on_through_a_whole_cycle() -> None:
    path = best_path(walk_with([2] * 9, 50.0))
    assert (path.cycles[0].diff() > 0).all()
    assert path.cycles[0, -1] - path.cycles[0, 0] == pytest.approx((18 - 2 * 2 / 3) / 64)


def test_a_path_does_not_follow_what_the_scores_do_not_pay_for() -> None:
    assert best_path(walk_with([3, -3] * 4, 0.1)).cycles.diff().abs().max() == 0


@pytest.mark.parametrize("minimum", [False, True])
@torch.no_grad()
def test_the_path_finds_shifted_pulses(minimum: bool) -> None:
    """Speech that is the source itself at another phase, for a base that expects it."""
    torch.manual_seed(0)
    flow = build_flow(FrameGlowConfig(minimum_phase=minimum), HIFIGAN).eval()
    conditioner = flow.conditioner
    assert isinstance(conditioner, FrameConditioner)
    conditioner.gains.bias[:256] = -1.0  # the expected speech is plus the source
    mel = torch.full((1, 80, 30), -0.2)
    if minimum:
        mel += torch.from_numpy(np.log(np.abs(resonance(mel_center_hz(HIFIGAN)))))[:, None].float()
    read = conditioner._read(mel, None)
    read.voicing.fill_(1.0)
    state = None, torch.full((1, 30), 0.3, dtype=torch.float64)
    condition = conditioner._condition(read, mel, None, state)
    [source] = conditioner.layout.read(condition.features, "source")
    louder = read.level.exp() * source
    audio = conditioner.in_phase.inverse(louder.transpose(1, 2), condition)[0][:, 0]
    path = conditioner._path(audio, read, None, None)
    assert (path.cycles - 0.3).abs().max() < 1.5 / N_OFFSETS


@pytest.mark.parametrize("config", [TINY, MINIMUM_PHASE], ids=["pulses", "minimum phase"])
@torch.no_grad()
def test_the_matched_filter_scores_what_the_base_expects(
    config: FrameGlowConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, (audio, mel) = tiny(config), tiny_batch(12)
    conditioner = flow.conditioner
    assert isinstance(conditioner, FrameConditioner)
    seen: list[Tensor] = []

    def scores(matched: Tensor, turns: Tensor, period: Tensor) -> Tensor:
        seen.append(matched.flatten(1))
        return torch.zeros(*matched.shape[:2], N_OFFSETS)

    monkeypatch.setattr("waveflow.models.frameglow.conditioner.pulse_scores", scores)
    read = conditioner._read(mel, None)
    conditioner._path(audio, read, None, None)
    condition = conditioner(mel)
    source, shift, level = conditioner.layout.read(condition.features, "source", "shift", "level")
    y = conditioner.in_phase(audio[:, None], condition)[0].transpose(1, 2)
    u = (y * (-level).exp()).clamp(-8, 8)
    expected = (u * (IN_PHASE * source - shift)).sum((1, 2))
    pulses = conditioner.source(read.f0)
    torch.testing.assert_close((seen[0] * pulses).sum(1), expected, rtol=0, atol=1e-8)


@torch.no_grad()
def test_likelihoods_are_bounds_that_count_the_path() -> None:
    flow, (audio, mel) = tiny(), tiny_batch(12)
    assert flow.is_bound
    assert flow.measure == "lower bound"
    cond, state, prior = flow.fitted(audio, mel)
    assert prior is not None
    given_path, z = flow.log_prob(audio, cond)
    torch.testing.assert_close(flow(audio, mel), given_path + prior.sum(1) / audio.shape[1])
    assert (prior.sum(1) < -math.log(N_OFFSETS)).all()
    # The state is all that decoding needs to take the same z back.
    torch.testing.assert_close(flow.decode(z, mel, state=(state, None)), audio, rtol=0, atol=1e-9)
    frames, log_prob, _ = flow.by_frame(audio, mel)
    torch.testing.assert_close(frames.mean(1), log_prob)
    torch.testing.assert_close(log_prob, flow(audio, mel))


@torch.no_grad()
def test_a_later_window_has_the_rest_of_the_path() -> None:
    flow, (_, mel) = tiny(), tiny_batch(40)
    conditioner = flow.conditioner
    path = torch.linspace(0, 0.5, 40).double().expand(2, 40)
    state = (torch.tensor([0.1, 0.7]).double(), path)
    whole = LAYOUT.read(conditioner(mel, None, state).features, "source")[0]
    later = conditioner.carry(mel, None, state, 20)
    assert torch.equal(later[1], path[:, 20:])
    cut = LAYOUT.read(conditioner(mel[..., 20:], None, later).features, "source")[0]
    inner = conditioner.anchor + 1
    torch.testing.assert_close(cut[:, inner:], whole[:, 20 + inner :], rtol=0, atol=1e-9)


@torch.no_grad()
def test_stacks_ignore_what_lies_beyond_the_mask() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 12, 8)
    mask = (torch.arange(12) < 7)[None, :, None].float()
    for stack in (ConvNeXt(8, 2), GatedStack(8, (1, 2))):
        loud = torch.where(mask.bool(), x, 1e3)
        expected = stack(x[:, :7])
        torch.testing.assert_close(stack(loud, mask)[:, :7], expected, rtol=1e-5, atol=1e-5)


# --- HarmonicSource ---


def sum_of_cosines(
    f0: np.ndarray, sample_rate: int, hop: int, start: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, term by term: (T,) and the number of harmonics at each sample."""
    centres = np.arange(len(f0)) * hop + (hop - 1) / 2
    per_sample = np.interp(np.arange(len(f0) * hop), centres, f0)
    cycles = start + np.cumsum(per_sample / sample_rate)
    n_harmonics = np.floor(sample_rate / 2 / per_sample)
    total = np.zeros(len(cycles))
    for k in range(1, int(n_harmonics.max()) + 1):
        total += np.where(k <= n_harmonics, np.cos(2 * np.pi * k * cycles), 0)
    return total * np.sqrt(2 / n_harmonics), n_harmonics


@pytest.mark.parametrize("start", [None, 0.0, 0.25, 0.9])
def test_source_is_the_sum_of_its_harmonics(start: float | None) -> None:
    """Through a glide: the phase does not jump at frames, nor with the number of harmonics."""
    f0 = np.concatenate([np.linspace(90, 310, 60), np.linspace(310, 120, 40)])
    expected, _ = sum_of_cosines(f0, 8000, 64, start or 0.0)
    phase = None if start is None else torch.tensor([start], dtype=torch.float64)
    source = HarmonicSource(8000, 64)(torch.from_numpy(f0)[None], phase)[0].numpy()
    # Where the closed form is 0/0 it is replaced by its limit, K, within sin(pi phi) < 1e-4.
    assert np.abs(source - expected).max() < 2e-3 * np.abs(expected).max()


def test_a_steady_source_has_all_harmonics_below_nyquist_and_nothing_else() -> None:
    rate, f0 = 8000, 210.0
    source = HarmonicSource(rate, 50)(torch.full((1, rate // 50), f0))[0]
    assert source.dtype == torch.float32
    assert source.square().mean().item() == pytest.approx(1.0, abs=1e-3)
    power = torch.fft.rfft(source.double()).abs().square() / (rate / 2) ** 2  # bins of 1 Hz
    harmonics = torch.arange(210, 4000, 210)
    assert len(harmonics) == 19
    torch.testing.assert_close(
        power[harmonics], torch.full((19,), 2 / 19, dtype=torch.float64), rtol=1e-3, atol=0
    )
    power[harmonics] = 0
    assert power.sum() < 1e-6


@pytest.mark.parametrize("f0", [55.0, 101.3, 554.0])
def test_source_has_unit_power(f0: float) -> None:
    source = HarmonicSource(22050, 256)(torch.full((1, 344), f0))
    assert source.square().mean().item() == pytest.approx(1.0, abs=5e-3)


def test_the_phase_holds_for_an_hour() -> None:
    """Float32 would be off by tens of degrees: its steps at 490,000 cycles are 0.03."""
    rate, hop, f0 = 1000, 250, 137
    n_samples = 3600 * rate
    source = HarmonicSource(rate, hop)(torch.full((1, n_samples // hop), float(f0)))[0]
    cycles = np.arange(n_samples - rate + 1, n_samples + 1, dtype=np.int64) * f0 % rate / rate
    expected = sum(np.cos(2 * np.pi * k * cycles) for k in (1, 2, 3)) * math.sqrt(2 / 3)
    assert np.abs(source[-rate:].numpy() - expected).max() < 1e-5


# --- PitchHead ---


def test_f0_between_classes_is_found() -> None:
    """From the target itself, a bump of 25 cents, for any F0 in the tracker's range."""
    f0 = torch.linspace(60, 500, 333)
    cents = 1200 * torch.log2(f0 / LOWEST_HZ)
    distance = cents[:, None] - CENTS_PER_CLASS * torch.arange(N_CLASSES)
    logits = -0.5 * (distance / CENTS_PER_CLASS).square()
    found = PitchHead.f0_hz(logits)
    assert (1200 * torch.log2(found / f0)).abs().max() < 1.0
    # A second, lower peak far away does not pull it.
    logits[:, 0] = logits.amax(1) - 0.5
    assert (1200 * torch.log2(PitchHead.f0_hz(logits) / f0))[60:].abs().max() < 1.0


def test_f0_stays_in_its_range() -> None:
    logits = torch.full((2, N_CLASSES), -20.0)
    logits[0, 0], logits[1, -1] = 5.0, 5.0
    low, high = PitchHead.f0_hz(logits)
    assert low >= LOWEST_HZ
    assert high <= LOWEST_HZ * 2 ** ((N_CLASSES - 1) * CENTS_PER_CLASS / 1200)


def test_the_pitch_head_learns_one_batch() -> None:
    torch.manual_seed(0)
    mel = torch.randn(2, 24, 8)
    f0 = 80 * torch.exp2(1.5 * torch.rand(2, 24))
    f0[:, ::3] = 0
    head = PitchHead(8, channels=32, n_layers=1)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    first = head.loss(mel, f0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(mel, f0)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
    logits, voicing = head(mel)
    voiced = f0 > 0
    assert ((voicing > 0) == voiced).float().mean() > 0.95
    cents = 1200 * torch.log2(head.f0_hz(logits)[voiced] / f0[voiced])
    assert cents.abs().median() < 50


def test_the_pitch_heads_loss_on_silence_is_voicing_alone() -> None:
    torch.manual_seed(0)
    head, mel = PitchHead(8, channels=16, n_layers=1), torch.randn(1, 10, 8)
    loss = head.loss(mel, torch.zeros(1, 10))
    _, voicing = head(mel)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(voicing).mean())
