"""Mistakes of a user, as exceptions of one line each.

Every message names the thing, the value and the remedy.
The command line prints the message and exits with status 2.
"""


class WaveflowError(Exception):
    """Base of every error that the user's input causes."""


class CheckpointError(WaveflowError):
    """A checkpoint that is missing, damaged, of another format, or does not fit its config."""


class MelMismatchError(WaveflowError):
    """A mel spectrogram that a model cannot voice: wrong bands, shape or values."""


class AudioError(WaveflowError):
    """An audio file or waveform that cannot be read, written or used."""


class ConfigError(WaveflowError):
    """A configuration, recipe or option that is wrong."""


class DataError(WaveflowError):
    """A corpus or training cache that is missing, empty or inconsistent."""


class DivergedError(WaveflowError):
    """A training whose steps, weights or validation are no longer finite numbers."""


class ContractError(WaveflowError):
    """A bijection that does not keep its promises (`check_bijection`)."""


def fault(error: Exception) -> str:
    """Returns one line about an error that is a fault of ours: no input may cause it."""
    reason = (str(error).splitlines() or [""])[0]
    return f"internal error ({type(error).__name__}): {reason:.200}"
