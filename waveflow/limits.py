"""What a file may ask for: one table of limits.

Files state sizes: of recordings, arrays and networks, and of what an archive unpacks to. Each size
is compared with what the file itself can justify and with a limit of this table, before memory or
time is spent. The limits are far above what speech needs. An environment variable of the limit's
name raises it.
"""

import os
from typing import NamedTuple

from waveflow.errors import ConfigError, WaveflowError


class Limit(NamedTuple):
    """A limit.

    Attributes:
        name: the environment variable that replaces it.
        default: the value without that variable.
        unit: of the value, in words.
    """

    name: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The limit that holds.

        Raises:
            ConfigError: the environment variable is no number.
        """
        given = os.environ.get(self.name, "")
        if not given:
            return self.default
        if not given.isdecimal() or len(given) > 18:
            raise ConfigError(f"{self.name}={given!r:.40} is no whole number: change or unset it")
        return int(given)

    def problem(self, what: str, amount: float) -> str:
        """Returns why `what` may not have this amount, and the remedy; an empty text if it may."""
        if amount <= self.value:
            return ""
        words = f"{amount:,}" if amount < 2**63 else "over 9e18"
        return (
            f"{what} {words} {self.unit}, more than the limit of {self.value:,}: "
            f"set {self.name} in the environment to raise it, if you trust this file"
        )

    def check(self, what: str, amount: float, error: type[WaveflowError]) -> None:
        """Raises the error if `what` has more than the limit. `what` ends in a verb."""
        if problem := self.problem(what, amount):
            raise error(problem)


# --- audio and mels ---

# 1 GiB as float32: three hours at 22,050 Hz.
SAMPLES = Limit("WAVEFLOW_MAX_SAMPLES", 2**28, "samples")
# Opus at 6 kbit/s has 64. A file of silence alone, such as FLAC makes, has thousands.
SAMPLES_PER_BYTE = Limit("WAVEFLOW_MAX_SAMPLES_PER_BYTE", 256, "samples a byte")
# Five hours of 80 bands.
MEL_VALUES = Limit("WAVEFLOW_MAX_MEL_VALUES", 2**27, "values")
# Compressed recordings and mels shrink little. What grows by more than this holds neither.
EXPANSION = Limit("WAVEFLOW_MAX_EXPANSION", 50, "bytes for each of its own")
# Small files may grow by more, and have more samples a byte.
FREE_BYTES = 2**20
FREE_SAMPLES = 2**22
# Hz. Below it lies no speech, and resampling would make much of little.
LEAST_SAMPLE_RATE = 1000

# --- models ---

# 1 GiB as float32; a full WaveGlow has 88 million, in 686 tensors.
PARAMETERS = Limit("WAVEFLOW_MAX_PARAMETERS", 2**28, "parameters")
MODEL_TENSORS = Limit("WAVEFLOW_MAX_MODEL_TENSORS", 2**11, "tensors")
# In a file, which may hold a run's moments or an optimizer as well.
TENSORS = Limit("WAVEFLOW_MAX_TENSORS", 2**14, "tensors")
# Of weights, and of a run's moments.
WEIGHTS_BYTES = Limit("WAVEFLOW_MAX_WEIGHTS_BYTES", 2**32, "bytes")
# Of config.json and its like, and of the header of a file of weights.
DOCUMENT_BYTES = Limit("WAVEFLOW_MAX_DOCUMENT_BYTES", 2**23, "bytes")
RECIPE_BYTES = Limit("WAVEFLOW_MAX_RECIPE_BYTES", 2**16, "bytes")
# Parts of a dotted key: the time of Python's reader of TOML grows with their square.
KEY_PARTS = Limit("WAVEFLOW_MAX_KEY_PARTS", 200, "parts")
SAMPLE_RATE = Limit("WAVEFLOW_MAX_SAMPLE_RATE", 2**20, "Hz")
N_FFT = Limit("WAVEFLOW_MAX_N_FFT", 2**16, "samples")
HOP_LENGTH = Limit("WAVEFLOW_MAX_HOP_LENGTH", 2**12, "samples")
N_MELS = Limit("WAVEFLOW_MAX_N_MELS", 2**10, "bands")

# --- files of torch.save ---

# Of all pickles together. A full WaveGlow with its optimizer has less than two million.
PICKLE_BYTES = Limit("WAVEFLOW_MAX_PICKLE_BYTES", 2**23, "bytes")
# Of a file with a mel alone, which has less than a thousand.
MEL_PICKLE_BYTES = Limit("WAVEFLOW_MAX_MEL_PICKLE_BYTES", 2**16, "bytes")

# --- archives ---

# Files beyond the first thousand take as many bytes each on average; recordings take far more.
BYTES_OF_A_MEMBER = 256
FREE_MEMBERS = 1000
# Of a tar's extended header, which holds long names.
TAR_HEADER_BYTES = 2**16
# Behind the end of a tar. Its writers pad to 10 KiB, those of tapes to more.
TRAILING_BYTES = 2**20
# Characters of a member's path.
PATH_LENGTH = 1000
