"""waveflow: mel spectrograms to speech with normalizing flows.

    import waveflow
    vocoder = waveflow.load()
    wav = vocoder(mel)

Names are loaded when they are used, so that `import waveflow` pulls in neither torch nor
anything else that is heavy.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from waveflow.audio.mel import MelConfig, MelSpectrogram
    from waveflow.bijections import check_bijection
    from waveflow.engine.options import Speech, SynthesisOptions
    from waveflow.engine.vocoder import Vocoder, VocoderWarning, load
    from waveflow.flow import Conditioner, Flow
    from waveflow.models.registry import FlowConfig, register
    from waveflow.pretrained import list_models
    from waveflow.publish import push_to_hub
    from waveflow.tts.speaker import Speaker, load_speaker

__version__ = "0.1.0"

# oneDNN compiles for each length of a mel, and torch and oneDNN keep 1,024 of these products each,
# half a megabyte apiece: a server that meets new lengths would fill both. FrameGlow takes 9 and 19
# entries for a length. Both variables are read once, at the first product.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

_WHERE = {
    "Conditioner": "waveflow.flow",
    "Flow": "waveflow.flow",
    "FlowConfig": "waveflow.models.registry",
    "MelConfig": "waveflow.audio.mel",
    "MelSpectrogram": "waveflow.audio.mel",
    "Speaker": "waveflow.tts.speaker",
    "Speech": "waveflow.engine.options",
    "SynthesisOptions": "waveflow.engine.options",
    "Vocoder": "waveflow.engine.vocoder",
    "VocoderWarning": "waveflow.engine.vocoder",
    "check_bijection": "waveflow.bijections",
    "list_models": "waveflow.pretrained",
    "load": "waveflow.engine.vocoder",
    "load_speaker": "waveflow.tts.speaker",
    "push_to_hub": "waveflow.publish",
    "register": "waveflow.models.registry",
}
__all__ = [
    "Conditioner",
    "Flow",
    "FlowConfig",
    "MelConfig",
    "MelSpectrogram",
    "Speaker",
    "Speech",
    "SynthesisOptions",
    "Vocoder",
    "VocoderWarning",
    "__version__",
    "check_bijection",
    "list_models",
    "load",
    "load_speaker",
    "push_to_hub",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'waveflow' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
