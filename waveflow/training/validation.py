"""Validation: the likelihood of held speech and of the model's own draws."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from waveflow.audio.dequantise import dequantise
from waveflow.data.cache import TrainingCache
from waveflow.flow import Flow


class Validation(NamedTuple):
    """Means over all validation audio, in nats per audio sample, and one draw (T,)."""

    log_likelihood: float
    draw_log_likelihood: float
    example: Tensor


@torch.inference_mode()
def validate(flow: Flow, cache: TrainingCache, mel: nn.Module, device: torch.device) -> Validation:
    """log p of every validation clip, dequantised with a fixed seed, and of a draw at sigma 1.

    The two means are equal for a model whose draws are distributed as speech is.
    """
    total, draw_total, n_samples = 0.0, 0.0, 0
    example = torch.zeros(0)
    for index, (clip, samples, _) in enumerate(cache.val_clips()):
        length = clip.frames * cache.hop_length
        audio = dequantise(torch.from_numpy(samples), index)[:length].to(device)
        cond = flow.condition(mel(audio[None])[..., : clip.frames])
        cond = cond.crop(length // flow.channels)
        log_prob = flow.log_prob(audio[None], cond)[0]
        draw, _ = flow.bijection.inverse(flow.noise(clip.frames, [0]).to(device), cond)
        draw_log_prob = flow.log_prob(draw[:, 0], cond)[0]
        total += log_prob.item() * length
        draw_total += draw_log_prob.item() * length
        n_samples += length
        if index == 0:
            example = draw[0, 0].cpu()
    return Validation(total / n_samples, draw_total / n_samples, example)
