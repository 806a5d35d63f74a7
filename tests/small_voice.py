"""A voice with random weights, too small to be of use."""

import torch

from waveflow.tts.glow_tts import GlowTTS, GlowTTSConfig

TINY = GlowTTSConfig(
    width=8, n_layers=1, duration_layers=1, n_flows=2, flow_width=8, dilations=(1,)
)
N_MELS = 80


def tiny_model_of(n_mels: int) -> GlowTTS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GlowTTS(TINY, n_mels)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        # The flow as training leaves it after its first batch.
        for name, buffer in model.named_buffers():
            if name.endswith("initialized"):
                buffer.fill_(True)
        return model.eval()
