"""Coqui's call: a vocoder of its Synthesizer."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from waveflow.adapters.base import Adapter
from waveflow.audio.mel_config import MelConfig

# What a vocoder's config file calls our models.
NAME = "waveflow"


class CoquiVocoder(Adapter):
    """In the place of a BaseVocoder.

    Args:
        vocoder, options: as `Adapter`. Mels of Coqui's default audio settings are
            `convention="coqui"`; those of a model with other bands need `lossy=True`.

    Example:
        >>> CoquiVocoder().inference(torch.full((1, 80, 3), -8.0)).shape
        torch.Size([1, 1, 768])
    """

    def inference(self, mel: Tensor) -> Tensor:
        """(1, 80, F) to (1, 1, F 256)."""
        return self.speak(mel)[:, None]

    forward = inference


def attach(synthesizer: Any, vocoder: CoquiVocoder) -> None:
    """Puts the vocoder into a `TTS.utils.synthesizer.Synthesizer`.

    It gets the mels of the text-to-mel model as they are: the Synthesizer undoes that model's
    normalisation and applies it again.

    Args:
        synthesizer: with a text-to-mel model.
        vocoder: its convention is that of the model's mels.
    """
    processor = synthesizer.tts_model.ap
    synthesizer.vocoder_model = vocoder
    synthesizer.vocoder_ap = processor
    # Another rate would stretch the mel: the convention sees to rates.
    synthesizer.vocoder_config = {"audio": {"sample_rate": processor.sample_rate}}
    synthesizer.output_sample_rate = vocoder.sample_rate


def register() -> None:
    """Lets Coqui load a model of ours from files, in this process.

    Its `vocoder_checkpoint` is then a model's folder, and its `vocoder_config` a JSON file with
    `"model": "waveflow"` and `"audio"` as `coqui_audio` gives it.
    """
    from TTS.vocoder.configs.shared_configs import BaseVocoderConfig

    @dataclass
    class WaveflowConfig(BaseVocoderConfig):
        model: str = NAME

    class Waveflow(CoquiVocoder):
        def __init__(self, config: Any) -> None:
            nn.Module.__init__(self)

        def load_checkpoint(self, config: Any, path: str, eval: bool = False) -> None:
            CoquiVocoder.__init__(self, path)

    for name, member in ((f"configs.{NAME}_config", WaveflowConfig), (f"models.{NAME}", Waveflow)):
        module = ModuleType(f"TTS.vocoder.{name}")
        setattr(module, member.__name__, member)
        sys.modules[module.__name__] = module


def coqui_audio(mel: MelConfig) -> dict[str, Any]:
    """Coqui's audio settings whose mel is a model's own: for text-to-mel models and vocoders."""
    return {
        "sample_rate": mel.sample_rate,
        "fft_size": mel.n_fft,
        "hop_length": mel.hop_length,
        "win_length": mel.win_length,
        "num_mels": mel.n_mels,
        "mel_fmin": mel.f_min,
        "mel_fmax": mel.f_max,
        "log_func": "np.log",
        "spec_gain": 1,
        "signal_norm": False,
        "preemphasis": 0.0,
        "do_trim_silence": False,
    }
