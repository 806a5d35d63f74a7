"""Parallel WaveNet (van den Oord 2018), ClariNet (Ping 2019): a student of a trained WaveNet."""

import math
from typing import Any, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Affine, Chain, Inverse, OverTime
from waveflow.conditioners import MelEncoder
from waveflow.distributions import gaussian_kl, standard_normal_log_prob
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.models.wavenet import SPEECH_STD
from waveflow.nn.causal_wavenet import CausalWaveNet
from waveflow.objective import Batch, Loss, Phase, Score


class ParallelWaveNetConfig(FlowConfig):
    """Sizes of a student.

    Attributes:
        hidden_channels: as in `WaveNetConfig` (papers: 64).
        flow_layers: of each flow, from the noise on; dilations 1 .. 512 (paper: 10, 10, 10, 30).
        n_features: of the mel.
    """

    type: Literal["parallel-wavenet"] = "parallel-wavenet"
    hidden_channels: PositiveInt = 32
    flow_layers: tuple[PositiveInt, ...] = (8, 8, 8, 8)
    n_features: PositiveInt = 64


class Student(Flow):
    """Inverse autoregressive flows: one pass for a draw, a pass for each sample for a density."""

    phase_settings = ("teacher",)

    @property
    def measure(self) -> str:
        return "negative KL"

    def phases(self, settings: Any, teacher: Flow | None = None) -> list[Phase]:
        if teacher is None:
            raise ConfigError("a student learns from a trained WaveNet: name it as the `teacher`")
        step = teacher.bijection
        if not (isinstance(step, OverTime) and isinstance(step.map, Affine)):
            raise ConfigError(f"teacher {settings.teacher}: give a WaveNet with a Gaussian head")
        distillation = Distillation(self, teacher, settings.precision)
        return [Phase("distillation", math.inf, distillation, distillation.score)]


class Distillation:
    """What a student q learns from its teacher p (ClariNet, section 3.3), at each sample:

        KL = log sigma_p / sigma_q + (sigma_q^2 - sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_p^2)
        loss = KL + 4 (log sigma_p - log sigma_q)^2 + mean (|STFT(speech)| - |STFT(x)|)^2

    x is the student's draw. q is given the noise before a sample and p is given x before it, so the
    mean of KL over draws is the divergence of the two densities of audio, nats per sample.
    """

    def __init__(self, student: Student, teacher: Flow, precision: str) -> None:
        self.student, self.teacher, self.precision = student, teacher, precision

    def __call__(self, batch: Batch) -> Loss:
        z = torch.randn(batch.share.total, 1, batch.audio.shape[1], device=batch.audio.device)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x, log_q, log_p, kl = self._compare(self.student, batch.mel, batch.share.of(z))
        spectrum, drawn = self._magnitudes(batch.audio), self._magnitudes(x[:, 0])
        terms = {
            "kl": kl.mean(),
            "scales": 4 * (log_p - log_q).square().mean(),
            "spectral": (spectrum - drawn).square().mean(),
        }
        return Loss(torch.stack([*terms.values()]).sum(), terms)

    def score(self, student: Student, mel: Tensor, z: Tensor) -> Score:
        """Minus KL, of one draw of mel (B, M, F) from noise z (B, 1, T); log q of that draw."""
        x, log_q, _, kl = self._compare(student, mel, z)
        log_prob = standard_normal_log_prob(z) - log_q.sum((1, 2))
        return Score(-kl.mean((1, 2)), log_prob / z.shape[2], x[:, 0])

    def _compare(self, student: Student, mel: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """x, log sigma_q, log sigma_p and KL, (B, 1, T) each (ClariNet, algorithm 1)."""
        x, mean_q, log_q = z, torch.zeros_like(z), torch.zeros_like(z)
        cond = student.condition(mel).crop(z.shape[2])
        for flow in reversed(list(cast(Chain, student.bijection))):
            step = cast(OverTime, cast(Inverse, flow).bijection)
            params = step.network(x, *cond)
            # x <- x sigma + mu, mu_q <- mu_q sigma + mu, sigma_q <- sigma_q sigma
            x, log_scale = step.map.forward(x, params)
            mean_q, log_q = step.map.forward(mean_q, params)[0], log_q + log_scale
        step, cond = cast(OverTime, self.teacher.bijection), self.teacher.condition(mel)
        params = step.network(x, *cond.crop(z.shape[2]))
        # Its z = (x - mu) / sigma, so that 0 comes from mu.
        mean_p, log_p = step.map.inverse(torch.zeros_like(x), params)
        return x, log_q, log_p, gaussian_kl(mean_q, log_q, mean_p, log_p)

    def _magnitudes(self, audio: Tensor) -> Tensor:
        n_fft = 4 * self.student.hop_length
        window = torch.hann_window(n_fft, device=audio.device)
        return torch.stft(audio, n_fft, n_fft // 4, window=window, return_complex=True).abs()


@register(ParallelWaveNetConfig)
def parallel_wavenet(config: ParallelWaveNetConfig, mel: MelConfig) -> Flow:
    """Flows z_t sigma(z_1 .. z_{t-1}) + mu(z_1 .. z_{t-1}), from noise to audio (section 3.2)."""
    steps, map = list[Inverse](), Affine(bound=9.0)
    for n_layers in reversed(config.flow_layers):
        sizes = 1, config.n_features, config.hidden_channels, map.n_params
        network = CausalWaveNet(*sizes, [2 ** (i % 10) for i in range(n_layers)])
        if not steps:  # the last one on the way from noise
            network.leave.bias.data = map.initial(1 / SPEECH_STD)
        steps.append(Inverse(OverTime(network, map)))
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length)
    return Student(Chain(*steps), conditioner, channels=1, hop_length=mel.hop_length)
