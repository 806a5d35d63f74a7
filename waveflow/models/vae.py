"""A variational autoencoder whose posterior is an inverse autoregressive flow (IAF)."""

from typing import Literal, cast

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    ActiveFirst,
    Affine,
    AllActive,
    Augment,
    Bijection,
    Chain,
    Condition,
    Coupling,
    OnChannels,
    OverChannels,
    Reverse,
    Squeeze,
)
from waveflow.conditioners import MelEncoder
from waveflow.distributions import standard_normal_log_prob
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.convnet import ConvNet
from waveflow.nn.made import MADE
from waveflow.objective import Batch


class VAEConfig(FlowConfig):
    """Sizes of a VAE.

    Attributes:
        squeeze_factor: samples in a vector.
        n_latents: latent variables of a vector.
        n_flows: autoregressive steps of the posterior; 0 for a Gaussian.
        hidden_channels: of all networks.
        n_features: of the mel.
    """

    type: Literal["vae"] = "vae"
    squeeze_factor: PositiveInt = 64
    n_latents: PositiveInt = 32
    n_flows: NonNegativeInt = 2
    hidden_channels: PositiveInt = 256
    n_features: PositiveInt = 64


class VAE(Flow):
    """A flow of audio and latents y. Its likelihoods are evidence lower bounds."""

    is_bound = True

    def training_loss(self, batch: Batch, cond: Condition) -> dict[str, Tensor]:
        """The two parts of the bound (IAF, equation 1), nats per audio sample.

        "reconstruction" is -log p(x | y) and "kl" is log q(y | x) - log p(y), both of one draw of
        y; minus their sum is the bound.
        """
        squeeze, level, augment, decoder, prior = cast(Chain, self.bijection)
        x, level_log_det = level(squeeze(batch.audio[:, None], cond)[0], cond)
        n_samples, n = batch.audio.shape[1], cast(Augment, augment).channels
        noise = torch.randn(batch.share.total, n, x.shape[2], device=x.device)
        joint, minus_log_q = augment(x, cond, batch.share.of(noise))
        joint, decoder_log_det = decoder(joint, cond)
        joint, prior_log_det = prior(joint, cond)
        residual, latents = joint.split([x.shape[1], n], 1)
        log_p_x = standard_normal_log_prob(residual) + decoder_log_det + level_log_det
        log_p_y = standard_normal_log_prob(latents) + prior_log_det
        return {
            "reconstruction": -log_p_x.mean() / n_samples,
            "kl": -(minus_log_q + log_p_y).mean() / n_samples,
        }


@register(VAEConfig)
def vae(config: VAEConfig, mel: MelConfig) -> Flow:
    """log p(x) >= E_q [log p(x | y) + log p(y) - log q(y | x)] (Kingma et al. 2016, equation 1).

    The posterior q starts from a Gaussian of the encoder's mean and scale and goes through
    `n_flows` steps y_t = mu_t + sigma_t y_{t-1}, autoregressive over the latents of a vector
    (equations 10 and 11, figure 2). The decoder p(x | y) and the prior p(y) are Gaussians.
    All see the mel, and an affine map of the mel first brings x to one level. Chained they are
    one flow of (x, y): the decoder is a coupling that y steers, and the prior an affine map of y.
    """
    n, n_latents, width = config.squeeze_factor, config.n_latents, config.hidden_channels

    def network(n_in: int, n_out: int, n_features: int = config.n_features) -> ConvNet:
        return ConvNet(n_in, n_features, width, n_out)

    encoder, start = network(n, width), network(0, 2 * n_latents, width)
    for part in (encoder, start):
        # From zero they would hide x: latents and decoder could learn nothing of each other.
        part.leave.reset_parameters()
    posterior: list[Bijection] = [Coupling(start, Affine(bound=5.0), AllActive())]
    for _ in range(config.n_flows):
        step = MADE(n_latents, width, width, Affine.n_params)
        posterior += [OverChannels(step, Affine(bound=3.0), n_latents), Reverse(n_latents)]
    level = Coupling(network(0, 2 * n), Affine(bound=9.0), AllActive())
    prior = Coupling(network(0, 2 * n_latents), Affine(bound=5.0), AllActive())
    bijection = Chain(
        Squeeze(n),
        level,
        Augment(n_latents, encoder, Chain(*posterior)),
        Coupling(network(n_latents, 2 * n), Affine(bound=5.0), ActiveFirst(n)),
        OnChannels(slice(n, None), prior),
    )
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length // n)
    return VAE(bijection, conditioner, n, mel.hop_length, latent_channels=n + n_latents)
