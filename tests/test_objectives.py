"""The losses of a run: energy distance, calibration, what a model owns, and parts of a step."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import (
    HOP,
    MEL,
    MODEL,
    MODELS,
    PLAIN,
    WAVEGLOW,
    WITH_NOISE_SHARE,
    batch_of,
    perturbed,
    recipe,
    speech,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from waveflow.audio.mel import MelSpectrogram
from waveflow.bijections import (
    ActNorm,
    Affine,
    Chain,
    Coupling,
    FactorOut,
    Halves,
    Inverse,
    InvertibleConv1x1,
    MapCond,
    Squeeze,
    SqueezeCondition,
)
from waveflow.bijections.base import Bijection, Condition
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.parallel_wavenet import ParallelWaveNetConfig
from waveflow.models.registry import FlowConfig, build_flow
from waveflow.objective import Batch, Loss, Phase, Share
from waveflow.training.objectives import (
    FlowLoss,
    SpectralDistance,
    _energy,
    _l1,
    _Magnitudes,
    calibration,
    noted_log_derivatives,
    path_volume,
    phases,
)

CPU = torch.device("cpu")


def loss_of(flow: Flow, batch: Batch, seed: int = 0, **train: object) -> Loss:
    """The loss of a recipe with these settings, whose noise has a seed."""
    torch.manual_seed(seed)
    return FlowLoss(flow, recipe(**train), CPU)(batch)


def due(batch: Batch) -> Batch:
    """As the batch of the eighth step, in which the noise head learns."""
    return replace(batch, step=7)


def gradient_of(flow: Flow, value: Tensor) -> Tensor:
    flow.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


# --- magnitudes and the energy distance ---


@pytest.mark.parametrize("window", [8, 128, 2048])
def test_magnitudes_are_those_of_torch(window: int) -> None:
    audio = torch.randn(2, 2200, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(1, 1, window // 2 + 1, generator=torch.Generator().manual_seed(1))
    ours = _Magnitudes.apply(audio, window)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), audio)
    hann = torch.hann_window(window)
    spectrum = torch.stft(
        audio, window, window // 4, window=hann, center=False, return_complex=True
    )
    theirs = spectrum.abs().transpose(1, 2) * math.sqrt(2 / window)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), audio)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [16, 41])
def test_magnitudes_gradient(length: int) -> None:
    """Also where the last samples fill no frame."""
    audio = torch.randn(2, length, generator=torch.Generator().manual_seed(0)).double()
    audio.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _Magnitudes.apply(x, 16), audio, fast_mode=False)


def test_magnitudes_of_silence_have_a_finite_gradient() -> None:
    audio = torch.zeros(1, 256, requires_grad=True)
    _Magnitudes.apply(audio, 128).sum().backward()
    assert torch.isfinite(audio.grad).all()


def noise(n_items: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(n_items, 2048, generator=torch.Generator().manual_seed(seed))


def test_energy_distance_is_least_for_draws_distributed_as_speech_is() -> None:
    """Against louder, quieter, differently coloured and collapsed draws.

    For draws of speech's own distribution the expectation is half the mean distance of two
    speech signals, E d(x, x') / 2, and not 0: the distance of speech to itself is not taken off.
    """
    spectral = SpectralDistance(MEL)
    x, first, second = noise(64, 1), noise(64, 2), noise(64, 3)

    def distance(first: Tensor, second: Tensor) -> float:
        torch.manual_seed(0)  # the same random filters
        return spectral.energy_distance(x, torch.cat([first, second])).item()

    def d(a: Tensor, b: Tensor) -> float:
        # With equal draws the third term is (nearly) 0, and what remains is d(a, b).
        torch.manual_seed(0)
        return spectral.energy_distance(a, torch.cat([b, b])).item()

    own = distance(first, second)
    assert own == pytest.approx(d(x, first) / 2, rel=0.03)
    others = {
        "louder": distance(1.5 * first, 1.5 * second),
        "quieter": distance(first / 1.5, second / 1.5),
        "coloured": distance(first + first.roll(1, 1), second + second.roll(1, 1)),
        "collapsed": distance(first, first),
        "silent": distance(0 * first, 0 * first),
    }
    # 64 items of 20 to 60 frames: the means hold to about 1 %.
    assert {name: value for name, value in others.items() if value < 1.1 * own} == {}


def test_energy_distance_does_not_care_which_draw_is_first() -> None:
    spectral = SpectralDistance(MEL)
    x, first, second = noise(4, 1), noise(4, 2), 2 * noise(4, 3)
    torch.manual_seed(0)  # the same random filters
    one = spectral.energy_distance(x, torch.cat([first, second]))
    torch.manual_seed(0)
    other = spectral.energy_distance(x, torch.cat([second, first]))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_energy_distance_of_speech_to_itself_is_zero() -> None:
    audio, _ = speech(32)
    distance = SpectralDistance(MEL).energy_distance(audio, audio.repeat(2, 1))
    # The root of the mean square is rounded up at 0, by 1e-4 for each of the seven windows.
    assert 0 <= distance.item() < 1e-4


def test_random_projections_see_patches_and_not_only_bins() -> None:
    """Draws whose bins have the right distribution each, but do not move together in time."""
    spectral = SpectralDistance(MEL)

    def spectrum(seed: int, together: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        frames = torch.randn(3000, 1 if together else 9, 9, generator=generator)
        return frames.expand(3000, 9, 9)

    def distance(together: bool) -> float:
        torch.manual_seed(0)
        logarithms = torch.cat([spectrum(seed, together or seed == 1) for seed in (1, 2, 3)])
        steps = [_energy(spectral._slices(logarithms), _l1).item() for _ in range(20)]
        return sum(steps) / len(steps)

    def by_bins(together: bool) -> float:
        logarithms = torch.cat([spectrum(seed, together or seed == 1) for seed in (1, 2, 3)])
        return _energy(logarithms, _l1).item()

    # The least value is half of E d(x, x'), and not 0: a distance shows as a few percent of it.
    assert by_bins(False) == pytest.approx(by_bins(True), rel=0.005)
    assert distance(False) > 1.015 * distance(True)


def test_short_segments_have_no_patches() -> None:
    audio, _ = speech(32)
    short = audio[:, :2048].repeat(3, 1)
    spectral = SpectralDistance(MEL)
    assert torch.isfinite(spectral.energy_distance(short[: len(audio)], short[len(audio) :]))


# --- the loss of a whole flow ---


def test_terms_of_weight_zero_are_left_out() -> None:
    flow, batch = perturbed(), batch_of(*speech(32))
    plain = loss_of(flow, batch, energy_weight=0, calibration_weight=0)
    assert plain.terms.keys() == {"log_likelihood"}
    expected = flow(batch.audio, batch.mel).mean()
    torch.testing.assert_close(plain.terms["log_likelihood"], expected)
    torch.testing.assert_close(plain.value, -expected)
    assert "energy" not in loss_of(flow, batch, energy_weight=0).terms
    assert "calibration" not in loss_of(flow, batch, calibration_weight=0).terms


def test_likelihood_alone_comes_before_the_draws() -> None:
    flow, batch = perturbed(), batch_of(*speech(32))
    settings = recipe(pitch_steps=2, likelihood_steps=3)
    pitch, alone, whole = phases(flow, settings, CPU)
    assert (pitch.whole, alone.whole, whole.whole) == (False, True, True)
    assert alone.steps == 3
    plain = loss_of(flow, batch, energy_weight=0, calibration_weight=0)
    torch.manual_seed(0)
    value, terms = alone.loss(batch)
    assert terms.keys() == {"log_likelihood"}
    torch.testing.assert_close(value, plain.value)
    assert whole.loss(batch).terms.keys() == {"log_likelihood", "energy", "calibration"}


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    flow, batch = perturbed(), batch_of(*speech(32))
    weights = {"likelihood_weight": 2.0, "energy_weight": 3.0, "calibration_weight": 5.0}
    value, terms = loss_of(flow, batch, **weights)
    assert list(terms) == ["log_likelihood", "energy", "calibration"]
    expected = -2 * terms["log_likelihood"] + 3 * terms["energy"] + 5 * terms["calibration"]
    torch.testing.assert_close(value, expected)
    assert min(terms["energy"], terms["calibration"]) > 0.005


def test_a_model_may_bring_its_own_terms() -> None:
    class Bound(Flow):
        def training_loss(self, batch: Batch, cond: Condition) -> dict[str, Tensor]:
            own = super().training_loss(batch, cond)["nll"]
            return {"reconstruction": own + 1, "divergence": 0.5 * own}

    without_path = MODEL.model_copy(update={"phase_path": False})
    flow, batch = perturbed(without_path), batch_of(*speech(32))
    likelihood = loss_of(flow, batch).terms["log_likelihood"]
    flow.__class__ = Bound
    value, terms = loss_of(flow, batch, energy_weight=0, calibration_weight=0)
    assert list(terms) == ["reconstruction", "divergence"]
    torch.testing.assert_close(value, 1 - 1.5 * likelihood)


def test_draws_are_at_sigma_1_under_the_condition_of_the_speech() -> None:
    flow, batch = perturbed().train(), batch_of(*speech(32))
    energy = loss_of(flow, batch, seed=3).terms["energy"]
    torch.manual_seed(3)
    state = flow.conditioner.random_state(2, CPU)
    cond = flow.fitted(batch.audio, batch.mel, state=state).cond
    z = torch.randn(2, 2, 32, HOP).flatten(0, 1).transpose(1, 2)
    draws = flow.bijection.inverse(z, Condition(cond.features.repeat(2, 1, 1)))[0][:, 0]
    expected = SpectralDistance(MEL).energy_distance(batch.audio, draws)
    torch.testing.assert_close(energy, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "change", [{}, {"power": 2}, {"padding": "center"}], ids=["mel", "of energies", "with edges"]
)
def test_the_noise_head_learns_what_a_quiet_draw_lacks(change: dict[str, Any]) -> None:
    mel = MEL.model_copy(update=change)
    spectrogram = MelSpectrogram(mel)
    torch.manual_seed(0)
    flow = build_flow(WITH_NOISE_SHARE, mel).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    # A segment, whose own mel has seen what lies around it.
    audio, _ = speech(40)
    inner = slice(4 * HOP, 36 * HOP)
    batch = due(batch_of(audio[:, inner], spectrogram(audio)[:, :, 4:36]))
    plain = {"energy_weight": 0, "calibration_weight": 0}
    value, terms = loss_of(flow, batch, seed=3, **plain)
    torch.manual_seed(3)
    with torch.no_grad():
        cond = flow.fitted(batch.audio, batch.mel).cond
        features = flow.conditioner.layout.read(cond.features, "voicing")[0].transpose(1, 2)
        z = torch.randn(2, HOP, 32) * 0.2 ** (0.22 + 0.78 * features)
        quiet = flow.bijection.inverse(z, cond)[0][:, 0]
        # In nepers of amplitude.
        missing = (spectrogram(batch.audio) - spectrogram(quiet))[:, :, :32] / mel.power
        made_up = flow.conditioner.tempered(z, cond, 0.2)[1].features - cond.features
        made_up = made_up[:, flow.conditioner.layout.slices["mel"]] / mel.power
        distance = (made_up - missing).abs()
    expected = torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean() / 100
    torch.testing.assert_close(terms["loudness"], expected)
    torch.testing.assert_close(value, expected - terms["log_likelihood"])
    # It trains the head, and the head alone.
    with_head = gradient_of(flow, value)
    others = [p for name, p in flow.named_parameters() if "noise" not in name]
    found = torch.cat([p.grad.flatten() for p in others if p.grad is not None])
    assert len(with_head) == len(found) + 8 * 10
    between = loss_of(flow, replace(batch, step=8), **plain)
    assert "loudness" not in between.terms
    torch.testing.assert_close(found, gradient_of(flow, between.value))
    steps = torch.optim.Adam(flow.conditioner.noise.parameters(), 0.05)
    for step in range(60):
        steps.zero_grad()
        loss_of(flow, batch, step, **plain).terms["loudness"].backward()
        steps.step()
    assert loss_of(flow, batch, 3, **plain).terms["loudness"] < 0.8 * expected


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_exact_zeros(name: str) -> None:
    """Without the noise that training adds to every sample, and without a voiced frame."""
    flow, audio = perturbed(MODELS[name]), torch.zeros(2, 32 * HOP)
    batch = batch_of(audio, MelSpectrogram(MEL)(audio))
    settings = recipe(pitch_steps=0 if name == "waveglow" else 1)
    for phase in phases(flow, settings.model_copy(update={"model": MODELS[name]}), CPU):
        assert gradient_of(flow, phase.loss(batch).value).isfinite().all()


# --- calibration ---


def volumes(flow: Flow, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """V(speech) (B, F) and V(draw) (2 B, F) of FrameGlow, by its couplings' equations."""
    torch.manual_seed(seed)
    z = torch.randn(2, len(batch.mel), batch.mel.shape[2], HOP).flatten(0, 1).transpose(1, 2)
    cond = flow.fitted(batch.audio, batch.mel).cond
    paths = []
    for signal, seen, back in ((batch.audio[:, None], cond, False), (z, cond.repeat(2), True)):
        log_dx_dz: list[Tensor] = []

        def note(
            module: Coupling, inputs: Any, terms: list[Tensor] = log_dx_dz, c: Condition = seen
        ) -> None:
            passive, _ = module.split.split(inputs[0])
            params = module.network(passive, c.features)
            log_scale = params.chunk(2, 1)[1]
            if module.map.bound is not None:
                log_scale = module.map.bound * torch.tanh(log_scale / module.map.bound)
            terms.append(-log_scale.sum(1))

        steps = list(flow.bijection.steps)
        for step in reversed(steps) if back else steps:
            inner = getattr(step, "bijection", step)
            if isinstance(inner, Coupling):
                note(inner, [signal if inner is step else signal[:, step.channels]])
            signal = (step.inverse if back else step)(signal, seen)[0]
        paths.append(torch.stack(log_dx_dz).sum(0) / HOP)
    return paths[0], paths[1]


def test_calibration_of_frameglow_against_a_direct_computation() -> None:
    """Its value and its gradient; positions are frames."""
    flow, batch = perturbed(), batch_of(*speech(6, 3))
    found = loss_of(flow, batch, seed=5, energy_weight=0).terms["calibration"]
    speech_volume, draw_volume = volumes(flow, batch, seed=5)
    gap = torch.relu(speech_volume.repeat(2, 1) - draw_volume)
    # Neither sign of any part may be wrong: the gap is open in some frames and closed in others.
    assert 0.1 < (gap > 0).float().mean() < 0.9
    torch.testing.assert_close(found, gap.mean(), rtol=0, atol=1e-6)
    expected = gradient_of(flow, gap.mean())
    ours = gradient_of(flow, found)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_calibration_counts_what_the_contract_returns() -> None:
    """On one frame, with the 1x1 convolutions, whose volume cancels."""
    audio, mel = speech(1, 3)
    flow, batch = perturbed(), batch_of(0.1 * audio, mel)
    torch.manual_seed(7)
    z = torch.randn(6, 1, HOP).transpose(1, 2)
    cond = flow.fitted(batch.audio, batch.mel).cond
    with torch.no_grad():
        volume_of_speech = -flow.bijection(batch.audio[:, None], cond)[1] / HOP
        volume_of_draws = flow.bijection.inverse(z, cond.repeat(2))[1] / HOP
    gap = torch.relu(volume_of_speech.repeat(2) - volume_of_draws).mean()
    assert gap > 0.01
    found = loss_of(flow, batch, seed=7, energy_weight=0).terms["calibration"]
    torch.testing.assert_close(found, gap, rtol=1e-4, atol=1e-5)


def test_a_models_own_look_at_a_draw_is_no_path_of_calibration() -> None:
    flow, batch = perturbed(WITH_NOISE_SHARE), due(batch_of(*speech(32)))
    with noted_log_derivatives(flow.bijection) as terms:
        cond = flow.fitted(batch.audio, batch.mel).cond
        flow.log_prob(batch.audio, cond)
        n_terms = len(terms)
        assert flow.training_loss(batch, cond)["loudness"] > 0
    assert len(terms) == 2 * n_terms > 0  # that of the likelihood once more


def test_calibration_pulls_a_draw_of_little_volume_up() -> None:
    """The sign: draws that collapse must lose, and wide draws must cost nothing."""
    batch = batch_of(torch.zeros(1, 8), torch.zeros(1, 1, 2))
    wide, narrow = [torch.ones(1, 2)], [-torch.ones(1, 2)]
    # From speech to noise a log-derivative of -1 is a volume dx/dz of +1.
    speech_of_volume_1 = [-torch.ones(1, 2)]
    draws = [term.repeat(2, 1) for term in narrow]
    assert calibration(speech_of_volume_1, draws, batch).item() == pytest.approx(2 / 4)
    draws = [term.repeat(2, 1) for term in wide]
    assert calibration(speech_of_volume_1, draws, batch).item() == 0


def test_calibration_is_zero_where_the_volume_is_the_mels_alone() -> None:
    """A flow that has not been trained is its base: its volume does not depend on the signal."""
    torch.manual_seed(0)
    flow = build_flow(MODEL, MEL).eval()
    assert loss_of(flow, batch_of(*speech(32))).terms["calibration"] < 1e-6
    plain = Flow(Chain(Squeeze(HOP), InvertibleConv1x1(HOP)), None, HOP)
    assert loss_of(plain, batch_of(*speech(32))).terms["calibration"] == 0


def multi_scale() -> Chain:
    """Three levels of 16, 8 and 4 positions for 64 samples, and a step that runs backwards."""
    torch.manual_seed(1)

    def coupling(channels: int) -> Bijection:
        network = nn.Conv1d(channels // 2, channels, 3, padding=1)
        nn.init.normal_(network.weight, std=0.3)
        return Coupling(network, Affine(bound=1.0), Halves())

    def finer(*steps: Bijection) -> Bijection:
        inner = MapCond(Chain(*steps), SqueezeCondition(2))
        return Chain(Squeeze(2), inner, Inverse(Squeeze(2)))

    deepest = FactorOut(4, finer(coupling(8)))
    middle = finer(Inverse(coupling(8)), deepest)
    return Chain(Squeeze(4), ActNorm(4), coupling(4), middle)


@pytest.mark.parametrize("n_frames", [2, 4, 8])
def test_calibration_of_a_multi_scale_flow(n_frames: int) -> None:
    """Frames coarser than, as fine as, and finer than the coarsest level."""
    bijection = multi_scale().eval()
    x = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    with noted_log_derivatives(bijection) as there:
        z, log_det = bijection(x)
    with noted_log_derivatives(bijection) as back:
        _, inverse_log_det = bijection.inverse(z)
    assert [term.shape[1] for term in there] == [16, 8, 4]
    n_pooled = min(n_frames, 4)
    volume, same = path_volume(there, n_frames, 64), path_volume(back, n_frames, 64)
    assert volume.shape == (3, n_pooled)
    # Per sample, and so that the sum over an item is its log-determinant (ActNorm is at 0).
    torch.testing.assert_close(volume.sum(1) * 64 / n_pooled, log_det, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(same.sum(1) * 64 / n_pooled, inverse_log_det, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(volume, -same, rtol=1e-4, atol=1e-5)
    # Positions of one frame are pooled, not those of several.
    whole = there[0].unflatten(1, (n_pooled, -1)).sum(2) + there[2].unflatten(
        1, (n_pooled, -1)
    ).sum(2)
    whole = whole + there[1].unflatten(1, (n_pooled, -1)).sum(2)
    torch.testing.assert_close(volume, whole * n_pooled / 64)


def test_a_multi_scale_flow_trains_with_all_terms() -> None:
    flow = Flow(multi_scale(), None, 4, HOP)
    audio, mel = speech(32)
    value, terms = loss_of(flow.train(), batch_of(audio, mel))
    assert terms["calibration"] > 0
    assert torch.isfinite(gradient_of(flow, value)).all()


def test_maps_are_as_before_after_they_were_noted() -> None:
    """Also those that are modules, and after an error."""

    class ModuleMap(nn.Module):
        n_params = 2

        def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            return Affine().forward(x, params)

        def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            return Affine().inverse(z, params)

    own, plain = ModuleMap(), Affine()
    chain = Chain(
        Coupling(nn.Conv1d(1, 2, 1), own, Halves()), Coupling(nn.Conv1d(1, 2, 1), plain, Halves())
    )
    with pytest.raises(RuntimeError), noted_log_derivatives(chain) as terms:
        chain(torch.randn(1, 2, 5))
        raise RuntimeError
    assert [term.shape for term in terms] == [(1, 5)] * 2
    assert chain[0].map is own and chain[1].map is plain
    chain(torch.randn(1, 2, 5))
    assert len(terms) == 2


# --- phases and teachers ---


class Student(Flow):
    """Learns to be as likely as another flow says."""

    def phases(self, settings: Any, teacher: Flow | None = None) -> list[Phase]:
        assert teacher is not None

        def loss(batch: Batch) -> Loss:
            with torch.no_grad():
                wanted = teacher(batch.audio, batch.mel)
            distance = (self(batch.audio, batch.mel) - wanted).square().mean()
            return Loss(distance, {"distance": distance})

        return [Phase("distil", math.inf, loss)]


def test_a_phase_without_end_may_hold_another_flow() -> None:
    student = perturbed()
    student.__class__ = Student
    (phase,) = phases(student, recipe(**PLAIN), CPU, perturbed(seed=0))
    assert phase.loss(batch_of(*speech(32))).value < 1e-9  # its teacher is as it is
    (phase,) = phases(student, recipe(**PLAIN), CPU, perturbed(seed=1))
    loss = phase.loss(batch_of(*speech(32)))
    assert loss.value > 1e-3
    assert gradient_of(student, loss.value).norm() > 0
    assert student.state_dict().keys() == perturbed().state_dict().keys()


@pytest.mark.parametrize("term", ["energy_weight", "calibration_weight"])
def test_a_phase_without_end_has_no_terms_of_a_recipe(term: str) -> None:
    student = perturbed()
    student.__class__ = Student
    wrong = recipe(**(PLAIN | {term: 2.0}))
    with pytest.raises(ConfigError, match=f"{term} 2: frameglow has a loss of its own"):
        phases(student, wrong, CPU, perturbed(seed=1))


def test_frameglow_trains_its_pitch_head_first() -> None:
    first, whole = phases(perturbed(), recipe(pitch_steps=7), CPU)
    assert (first.name, first.steps, whole.steps) == ("pitch head", 7, math.inf)
    (whole,) = phases(perturbed(), recipe(pitch_steps=0), CPU)
    assert isinstance(whole.loss, FlowLoss)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (WAVEGLOW, {"pitch_steps": 3}, "pitch_steps 3: waveglow has no phase that uses it"),
        (WAVEGLOW, {"teacher": "runs/x"}, "teacher runs/x: waveglow has no phase that uses it"),
        (MODEL, {"pitch_steps": 3, "teacher": "runs/x"}, "teacher runs/x: frameglow has no"),
        (
            ParallelWaveNetConfig(),
            {"pitch_steps": 3, "teacher": "runs/x"},
            "pitch_steps 3: parallel-wavenet has",
        ),
    ],
)
def test_settings_of_a_phase_that_a_model_lacks(
    config: FlowConfig, settings: dict[str, Any], message: str
) -> None:
    wrong = recipe(**({"pitch_steps": 0} | settings)).model_copy(update={"model": config})
    flow = build_flow(config, wrong.mel)
    with pytest.raises(ConfigError, match=message):
        phases(flow, wrong, CPU, flow)


# --- parts of a step ---


def unequal_items() -> Batch:
    """Five items of unequal loudness, and with unequal numbers of voiced frames."""
    audio, _ = speech(32, 5)
    audio = audio * 0.4 ** torch.arange(5)[:, None]
    batch = batch_of(audio, MelSpectrogram(MEL)(audio))
    return replace(batch, f0=150.0 * (torch.arange(32) < 5 + 9 * torch.arange(5)[:, None]))


@pytest.mark.parametrize("n_parts", [2, 3, 5])
@pytest.mark.parametrize("which", [0, 1], ids=["pitch head", "flow"])
def test_parts_give_the_loss_and_the_gradient_of_the_whole(n_parts: int, which: int) -> None:
    """Random numbers and counts to divide by are those of the whole step."""
    flow = perturbed(WITH_NOISE_SHARE).train()
    batch = due(unequal_items())
    phase = phases(flow, recipe(), CPU)[which]

    def weighed(parts: list[Batch]) -> tuple[Tensor, dict[str, float]]:
        flow.zero_grad()
        values: dict[str, float] = {}
        for part in parts:
            torch.manual_seed(3)
            loss = phase.loss(part)
            (loss.value * part.share.weight).backward()
            for name, term in loss.terms.items():
                values[name] = values.get(name, 0.0) + term.item() * part.share.weight
        flat = [p.grad.flatten() for p in flow.parameters() if p.grad is not None]
        return torch.cat(flat), values

    whole, terms = weighed([batch])
    summed, part_terms = weighed(batch.split(n_parts))
    # Sums in another order: float32's rounding of values that partly cancel.
    assert (whole - summed).norm() < 1e-4 * whole.norm()
    assert part_terms == pytest.approx(terms, rel=1e-4)
    assert whole.norm() > 0


def test_the_pitch_heads_loss_is_a_mean_over_voiced_frames() -> None:
    flow, batch = perturbed().train(), unequal_items()
    loss = phases(flow, recipe(), CPU)[0].loss(batch)
    expected = flow.conditioner.pitch_loss(batch.mel, batch.f0)
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.terms["pitch_loss"], expected)


def test_a_mean_over_the_step_is_computed_once_and_over_all_processes() -> None:
    """Process 0 has 2 of 5 items, in two parts."""
    calls: list[int] = []

    def statistic(batch: Batch) -> Tensor:
        calls.append(len(batch.mel))
        return batch.f0.mean()

    whole = unequal_items()
    others = replace(whole, f0=whole.f0[2:], share=Share(2, 5, 5)).f0.mean() * 3 / 5
    own = Batch(whole.audio[:2], whole.mel[:2], whole.f0[:2], Share(0, 2, 5), 0, others.__add__)
    first, second = own.split(2)
    assert (first.share, second.share) == (Share(0, 1, 5), Share(1, 2, 5))
    assert torch.equal(second.f0, whole.f0[1:2])
    for part in (first, second, own):
        torch.testing.assert_close(part.step_mean("f0", statistic), whole.f0.mean())
    assert calls == [2]
    second.step_mean("another", statistic)
    assert calls == [2, 2]


# --- precision ---


def test_bf16_is_close_to_float32_and_reaches_the_same_weights() -> None:
    flow, batch = perturbed(), batch_of(*speech(32))
    results = []
    for precision in ("float32", "bf16"):
        value, terms = loss_of(flow, batch, seed=3, precision=precision)
        results.append((torch.stack([*terms.values()]), gradient_of(flow, value)))
    (exact, exact_gradient), (rough, rough_gradient) = results
    # bfloat16 keeps 8 bits of the networks' outputs.
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(rough, exact)
    assert len(rough_gradient) == len(exact_gradient)
    assert torch.cosine_similarity(rough_gradient, exact_gradient, dim=0) > 0.99


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_half_precision_is_not_offered(name: str) -> None:
    with pytest.raises(ValueError, match="fp16 is not offered"):
        recipe(precision=name)


SENSITIVE = ("exp", "log", "sum", "mean", "var", "logdet", "slogdet", "inv", "det", "cumsum", "pow")


class Rounded(TorchDispatchMode):
    """Names the operations that read or write bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, result))
        if any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in flat):
            self.names.add(function.overloadpacket.__name__.removesuffix("_"))
        return result


@pytest.mark.parametrize("model", [WITH_NOISE_SHARE, WAVEGLOW], ids=MODELS)
def test_under_bf16_only_the_networks_are_rounded(model: FlowConfig) -> None:
    """Log-determinants, exponentials, inverses of 1x1 convolutions and reductions are not."""
    flow, batch = perturbed(model).train(), due(batch_of(*speech(32)))
    with Rounded() as rounded:
        value, terms = loss_of(flow, batch, precision="bf16")
    # Products and the convolutions, with what lies between them, and nothing else.
    assert rounded.names & {"mm", "addmm", "convolution", "mkldnn_rnn_layer"}
    wrong = {n for n in rounded.names if any(part in n.split("_") for part in SENSITIVE)}
    assert wrong == set()
    assert len(terms) == (4 if model == WITH_NOISE_SHARE else 3)
    assert {term.dtype for term in (value, *terms.values())} == {torch.float32}
    value.backward()
    assert {p.grad.dtype for p in flow.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_under_bf16_volumes_and_latents_are_float32_to_the_last_bit(name: str) -> None:
    """z is found again from the same parameters: the inverse's error is not bfloat16's 4e-3."""
    flow, (audio, mel) = perturbed(MODELS[name]), speech()
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast, noted_log_derivatives(flow.bijection) as terms:
        cond = flow.condition(mel)
        log_prob, z = flow.log_prob(audio, cond)
        back, _ = flow.bijection.inverse(z, cond)
    assert len(terms) == {"frameglow": 10, "waveglow": 6}[name]
    assert {t.dtype for t in (*terms, z, log_prob, back)} == {torch.float32}
    torch.testing.assert_close(back[:, 0], audio, rtol=0, atol=1e-4)
