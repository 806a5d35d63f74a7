"""Reads the config.json of the published code: sizes of the model and settings of the mel."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.checkpoint import first_problem
from waveflow.door import read_plain
from waveflow.errors import CheckpointError
from waveflow.limits import DOCUMENT_BYTES
from waveflow.models.waveglow import WaveGlowConfig


class NetworkSizes(BaseModel):
    """`WN_config` of a published config.json."""

    model_config = ConfigDict(frozen=True)

    n_layers: PositiveInt | None = None
    n_channels: PositiveInt | None = None
    kernel_size: PositiveInt | None = None


class ModelSizes(BaseModel):
    """`waveglow_config` of a published config.json."""

    model_config = ConfigDict(frozen=True)

    n_mel_channels: PositiveInt | None = None
    n_flows: PositiveInt | None = None
    n_group: PositiveInt | None = None
    n_early_every: PositiveInt | None = None
    n_early_size: PositiveInt | None = None
    WN_config: NetworkSizes = NetworkSizes()

    def stated(self) -> dict[str, int]:
        """Gives the sizes that the file states, those of the networks among them."""
        own = self.model_dump(exclude={"WN_config"}, exclude_none=True)
        return own | self.WN_config.model_dump(exclude_none=True)


class DataSettings(BaseModel):
    """`data_config` of a published config.json: settings of the mel."""

    model_config = ConfigDict(frozen=True)

    sampling_rate: PositiveInt = 22050
    filter_length: PositiveInt = 1024
    hop_length: PositiveInt | None = None
    win_length: PositiveInt = 1024
    mel_fmin: float = 0.0
    mel_fmax: float | None = 8000.0


class PublishedConfig(BaseModel):
    """The parts of a published config.json that matter here; the rest concerns its training."""

    model_config = ConfigDict(frozen=True)

    waveglow_config: ModelSizes = ModelSizes()
    data_config: DataSettings = DataSettings()


def read_config(path: Path | None) -> PublishedConfig:
    """Reads a published config.json, or gives the published defaults if the path is None.

    Raises:
        CheckpointError: missing, or not a config.
    """
    if path is None:
        return PublishedConfig()
    try:
        return PublishedConfig.model_validate(
            json.loads(read_plain(path, DOCUMENT_BYTES, CheckpointError))
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def mel_config(model: WaveGlowConfig, data: DataSettings) -> MelConfig:
    """Makes the published mel (TacotronSTFT) with the model's bands and its data's settings."""
    if data.hop_length not in (None, model.hop_length):
        raise CheckpointError(
            f"the config's hop_length is {data.hop_length}, the upsampler's {model.hop_length}"
        )
    fields = MEL_PRESETS["nvidia"].model_dump() | {
        "sample_rate": data.sampling_rate,
        "n_fft": data.filter_length,
        "hop_length": model.hop_length,
        "win_length": data.win_length,
        "n_mels": model.n_mels,
        "f_min": data.mel_fmin,
        "f_max": data.mel_fmax,
    }
    try:
        return MelConfig.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(first_problem(error)) from error
