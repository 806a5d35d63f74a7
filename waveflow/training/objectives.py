"""The loss of a run: a model's own objective, spectral energy distance and calibration."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.stft import overlap_add
from waveflow.errors import ConfigError
from waveflow.flow import Fitted, Flow, select_items
from waveflow.objective import Batch, Loss, Phase
from waveflow.training.config import Recipe

# The two shortest see single pulses of a voice.
WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
LOG_FLOOR = 1e-4
# Random filters of a step for each window, their size in frames and bins, and the weight of what
# they see.
N_FILTERS, FILTER_SIZE, SLICES_WEIGHT = 8, 5, 4.0


def phases(
    flow: Flow, recipe: Recipe, device: torch.device, teacher: Flow | None = None
) -> list[Phase]:
    """The phases of a run: the model's own first ones, likelihood alone, one without end.

    Args:
        teacher: the model that the recipe names, on the device, with frozen weights.

    Raises:
        ConfigError: the recipe has settings for phases that this model does not have, or its
            segments are too short.
    """
    config = recipe.train
    for name in ("pitch_steps", "teacher"):
        if (value := getattr(config, name)) and name not in flow.phase_settings:
            raise ConfigError(
                f"{name} {value}: {recipe.model.type} has no phase that uses it; leave it out"
            )
    first = flow.phases(config, teacher)
    segment = config.segment_frames * recipe.mel.hop_length
    if config.energy_weight and segment < max(WINDOWS):
        raise ConfigError(
            f"segment_frames {config.segment_frames} are {segment} samples; the energy "
            f"distance needs {max(WINDOWS)}: give longer segments"
        )
    if any(phase.steps == math.inf for phase in first):
        for name in ("energy_weight", "calibration_weight"):
            if value := getattr(config, name):
                raise ConfigError(
                    f"{name} {value:g}: {recipe.model.type} has a loss of its own, without this "
                    "term; leave it out"
                )
        return [phase._replace(whole=math.isinf(phase.steps)) for phase in first]
    if config.likelihood_steps:
        alone = config.model_copy(update={"energy_weight": 0.0, "calibration_weight": 0.0})
        loss = FlowLoss(flow, recipe.model_copy(update={"train": alone}), device)
        first.append(Phase("likelihood", config.likelihood_steps, loss, whole=True))
    return [*first, Phase("flow", math.inf, FlowLoss(flow, recipe, device), whole=True)]


class SpectralDistance(nn.Module):
    """d(a, b) of two batches of audio, from magnitude spectra of several windows and log-mels.

    d is built from L1 norms and unsquared L2 norms. With those the energy distance below is a
    proper scoring rule; with squares it would be a distance of means.

        d = 1/9 sum_w (mean |S_w(a) - S_w(b)| / mean S_w(x)
                       + mean over frames of rms over bins of log S_w(a) - log S_w(b))
            + 4/3 mean |mel(a) - mel(b)| + 4 mean_w slices_w,
        S_w = |STFT_w| sqrt(2 / w), hop w / 4

    The first terms see one bin or one frame. `slices` sees patches of frames and bins, where
    bursts, onsets and the valleys between harmonics are: the L1 distance of log S_w behind random
    filters, which every step draws anew. Distributions whose projections all agree are equal
    (Cramer and Wold 1936).
    """

    def __init__(self, mel: MelConfig) -> None:
        super().__init__()
        self.mel = MelSpectrogram(mel)

    @torch.no_grad()
    def levels(self, speech: Tensor) -> Tensor:
        """mean S_w(x) of speech (B, T), for each window (7,)."""
        return torch.stack([_Magnitudes.apply(speech, window).mean() for window in WINDOWS])

    def energy_distance(
        self, speech: Tensor, draws: Tensor, levels: Tensor | None = None
    ) -> Tensor:
        """[d(x, x') + d(x, x'') - d(x', x'')] / 2 (Gritsenko et al. 2020, equation 6).

        Args:
            speech: x (B, T).
            draws: x' and x'' of the same mels, (2 B, T).
            levels: `levels` of the whole step, if `speech` is a part of it.

        Returns:
            A scalar. Its expectation is least if draws have the distribution of speech.
        """
        both = torch.cat([speech, draws])
        total = torch.zeros((), device=speech.device)
        for index, window in enumerate(WINDOWS):
            linear = _Magnitudes.apply(both, window)
            level = linear[: len(speech)].detach().mean() if levels is None else levels[index]
            logarithms = linear.clamp_min(LOG_FLOOR).log()
            total = total + _energy(linear / level, _l1) / 9
            total = total + _energy(logarithms, _frame_rms) / 9
            if min(logarithms.shape[1:]) > FILTER_SIZE and window > 32:
                slices = _energy(self._slices(logarithms), _l1)
                total = total + SLICES_WEIGHT / len(WINDOWS) * slices
        return total + 4 / 3 * _energy(self.mel(both), _l1)

    def _slices(self, logarithms: Tensor) -> Tensor:
        """Random projections of patches of (N, frames, bins), every second place from 0 or 1 on."""
        shape = N_FILTERS, 1, FILTER_SIZE, FILTER_SIZE
        filters = torch.randn(shape, device=logarithms.device)
        filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
        down, right = torch.randint(2, (2,)).tolist()
        return functional.conv2d(logarithms[:, None, down:, right:], filters, stride=2)


class FlowLoss:
    """The loss that trains a whole flow: the model's own terms and those of the recipe.

    The model's own are `Flow.training_loss`. A recipe adds two, each from two draws of every mel
    at sigma 1, made under the same condition as the speech:

    - energy: the spectral energy distance between speech and draws.
    - calibration: the mean over frames of relu(V(speech) - V(draw)), V the log-volume dx/dz along
      a path (`path_volume`), in nats per audio sample. It keeps draws as likely as speech. The
      energy distance alone sees only magnitudes, and would let the phase of draws collapse.

    Args:
        flow: the flow to train.
        recipe: its weights of the terms and its precision.
        device: of the training.
    """

    def __init__(self, flow: Flow, recipe: Recipe, device: torch.device) -> None:
        self.flow = flow
        self.config = recipe.train
        self.spectral = SpectralDistance(recipe.mel).to(device)

    def __call__(self, batch: Batch) -> Loss:
        config, bijection = self.config, self.flow.bijection
        autocast = torch.autocast(
            batch.audio.device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        with autocast, noted_log_derivatives(bijection) as speech_path:
            cond, _, prior = self._fitted(batch)
            own = self.flow.training_loss(batch, cond)
            if prior is not None and "nll" in own:
                per_sample = prior.sum(1).mean() / batch.audio.shape[1]
                own["nll"] = own["nll"] - per_sample.to(own["nll"].dtype)
        value = config.likelihood_weight * torch.stack([*own.values()]).sum()
        # A log-likelihood is reported as such, not as a loss.
        terms = {name: term for name, term in own.items() if name != "nll"}
        if "nll" in own:
            terms = {"log_likelihood": -own["nll"], **terms}
        if not (config.energy_weight or config.calibration_weight):
            return Loss(value, terms)
        with autocast, noted_log_derivatives(bijection) as draw_path:
            draws, _ = bijection.inverse(self._noise(batch), cond.repeat(2))
        if config.energy_weight:
            # Of a part of the step, the level to divide by is that of the whole.
            levels = None
            if batch.share.weight < 1:
                levels = batch.step_mean("levels", lambda whole: self.spectral.levels(whole.audio))
            terms["energy"] = self.spectral.energy_distance(batch.audio, draws[:, 0], levels)
            value = value + config.energy_weight * terms["energy"]
        if config.calibration_weight:
            terms["calibration"] = calibration(speech_path, draw_path, batch)
            value = value + config.calibration_weight * terms["calibration"]
        return Loss(value, terms)

    def _fitted(self, batch: Batch) -> Fitted:
        state = None
        if self.flow.training:
            share = batch.share
            whole = self.flow.conditioner.random_state(share.total, batch.mel.device)
            state = select_items(whole, slice(share.start, share.stop))
        return self.flow.fitted(batch.audio, batch.mel, state=state)

    def _noise(self, batch: Batch) -> Tensor:
        """z ~ N(0, 1) of two draws for each item, (2 B, C, L)."""
        n_positions = batch.audio.shape[1] // self.flow.channels
        shape = 2, batch.share.total, n_positions, self.flow.latent_channels
        noise = torch.randn(shape, device=batch.audio.device)
        return batch.share.of(noise, axis=1).flatten(0, 1).transpose(1, 2)


def calibration(speech_path: list[Tensor], draw_path: list[Tensor], batch: Batch) -> Tensor:
    """How much less volume two draws have than the speech, a mean over frames, a scalar.

    Args:
        speech_path: log-derivatives that `noted_log_derivatives` noted from speech to noise.
        draw_path: those from noise to draws, two for each item.
    """
    if not speech_path:
        return batch.audio.new_zeros(())  # no volume depends on the signal
    n_frames, n_samples = batch.mel.shape[2], batch.audio.shape[1]
    # From audio to noise the log-derivatives are those of dz/dx, hence the sign.
    speech = -path_volume(speech_path, n_frames, n_samples)
    draws = path_volume(draw_path, n_frames, n_samples)
    return torch.relu(speech.repeat(2, 1) - draws).mean()


def path_volume(terms: list[Tensor], n_frames: int, n_samples: int) -> Tensor:
    """The sum of log-derivatives of one path, nats per audio sample, (B, frames).

    Levels of a multi-scale flow have different lengths. They are pooled to frames, or to the
    coarsest level if that is coarser than frames.

    Args:
        terms: (B, L_k), of each step.
        n_frames: F.
        n_samples: T, audio samples of an item.
    """
    n_pooled = math.gcd(n_frames, *(term.shape[1] for term in terms))
    pooled = [term.unflatten(1, (n_pooled, -1)).sum(2) for term in terms]
    return torch.stack(pooled).sum(0) * (n_pooled / n_samples)


@contextmanager
def noted_log_derivatives(bijection: nn.Module) -> Iterator[list[Tensor]]:
    """Notes, while it is open, the log-derivatives (B, L) of every map that `bijection` calls.

    A map belongs to a coupling or to another step with an attribute `map`. Its log-derivatives are
    summed over channels and have the sign of the direction that is called. Other steps with a
    volume (1x1 convolutions, ActNorm) are left out: their volume does not depend on the signal.
    So it is the same along the paths of speech and of its draws, and cancels in the difference.
    Calls without gradients are left out too: a model may look at draws of its own in its loss.
    """
    terms: list[Tensor] = []
    modules = bijection.modules()
    mapped = [module for module in modules if hasattr(getattr(module, "map", None), "n_params")]
    # An entry in __dict__ hides a map that is a module, too.
    own = [module.__dict__.get("map") for module in mapped]
    for module in mapped:
        module.__dict__["map"] = _NotedMap(module.map, terms)
    try:
        yield terms
    finally:
        for module, map_ in zip(mapped, own, strict=True):
            del module.__dict__["map"]
            if map_ is not None:
                module.__dict__["map"] = map_


class _NotedMap:
    """An elementwise map that notes its log-derivatives."""

    def __init__(self, map: Any, terms: list[Tensor]) -> None:
        self.map = map
        self.n_params = map.n_params
        self.terms = terms

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._note(*self.map.forward(x, params))

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._note(*self.map.inverse(z, params))

    def _note(self, result: Tensor, log_derivative: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            self.terms.append(log_derivative.sum(1))
        return result, log_derivative


class _Magnitudes(torch.autograd.Function):
    """|STFT| sqrt(2 / w) of audio (N, T), (N, frames, bins), frames inside the signal only.

    It has a backward of its own, an inverse real FFT and an overlap-add. Autograd would take a
    full complex FFT and a scatter for each frame; the energy distance then costs 1.6 times as much.
    """

    @staticmethod
    def forward(ctx: Any, audio: Tensor, window: int) -> Tensor:
        hann = torch.hann_window(window, device=audio.device) * (2 / window) ** 0.5
        spectrum = torch.fft.rfft(audio.unfold(1, window, window // 4) * hann)
        parts = torch.view_as_real(spectrum)
        magnitude = (parts.square().sum(-1) + 1e-12).sqrt()
        ctx.save_for_backward(spectrum, magnitude, hann)
        ctx.length = audio.shape[1]
        return magnitude

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        spectrum, magnitude, hann = ctx.saved_tensors
        window = len(hann)
        spectrum = spectrum * (grads[0] / magnitude)
        # irfft counts every bin but the first and last twice, and divides by the length.
        spectrum[..., 1:-1] *= 0.5
        frames = torch.fft.irfft(spectrum, n=window) * (hann * window)
        audio = overlap_add(frames, window // 4)
        return functional.pad(audio, (0, ctx.length - audio.shape[1])), None


def _energy(features: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x, first, second = features.chunk(3)
    return (distance(x, first) + distance(x, second) - distance(first, second)) / 2


def _l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean()


def _frame_rms(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).square().mean(-1) + 1e-8).sqrt().mean()
