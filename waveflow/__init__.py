"""waveflow: mel spectrograms to speech with normalizing flows.

    import waveflow
    vocoder = waveflow.load()
    wav = vocoder(mel)

Names are loaded when they are used, so that `import waveflow` pulls in neither torch nor
anything else that is heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from waveflow.audio.mel import MelConfig, MelSpectrogram
    from waveflow.engine.vocoder import Vocoder, load
    from waveflow.pretrained import list_models

__version__ = "0.1.0"
__all__ = ["MelConfig", "MelSpectrogram", "Vocoder", "__version__", "list_models", "load"]

_WHERE = {
    "MelConfig": "waveflow.audio.mel",
    "MelSpectrogram": "waveflow.audio.mel",
    "Vocoder": "waveflow.engine.vocoder",
    "list_models": "waveflow.pretrained",
    "load": "waveflow.engine.vocoder",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'waveflow' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
