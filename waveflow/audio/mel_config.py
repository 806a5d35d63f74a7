"""Settings of mel spectrograms. Nothing here imports torch, so commands can read them at once."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from waveflow.limits import HOP_LENGTH, N_FFT, N_MELS, SAMPLE_RATE

Padding = Literal["center", "hop"]
PadMode = Literal["reflect", "constant"]

_LIMITS = {"sample_rate": SAMPLE_RATE, "n_fft": N_FFT, "hop_length": HOP_LENGTH, "n_mels": N_MELS}


def edge_padding(n_fft: int, hop_length: int, padding: Padding) -> int:
    """Samples that the framing adds at each side of the audio, see `waveflow.audio.stft`."""
    return n_fft // 2 if padding == "center" else (n_fft - hop_length) // 2


class MelConfig(BaseModel):
    """Settings of a log-mel spectrogram: log(max(filterbank . |STFT|^power, log_floor)).

    The logarithm is natural. A window shorter than n_fft sits in the middle of its frame.

    Example:
        >>> MelConfig(sample_rate=22050).n_frames(22050)
        86
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_rate: int = Field(gt=0, description="Hz")
    n_fft: int = Field(default=1024, gt=1)
    hop_length: int = Field(default=256, gt=0)
    win_length: int = Field(default=1024, gt=0)
    n_mels: int = Field(default=80, gt=0)
    f_min: float = Field(default=0.0, ge=0, description="Hz, lower edge of the lowest band")
    f_max: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=8000.0, description="Hz, upper edge of the highest; None: Nyquist"
    )
    padding: Padding = Field(default="hop", description="Framing, see waveflow.audio.stft")
    pad_mode: PadMode = "reflect"
    mel_scale: Literal["slaney", "htk"] = "slaney"
    norm: Literal["slaney"] | None = "slaney"
    power: Literal[1, 2] = 1
    magnitude_floor: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Added to |STFT|^2, under the root",
    )
    log_floor: float = Field(default=1e-5, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, limit in _LIMITS.items():
            if problem := limit.problem(f"{name} is", getattr(self, name)):
                raise ValueError(problem)
        nyquist = self.sample_rate / 2
        if self.f_max is not None and self.f_max > nyquist:
            raise ValueError(
                f"f_max {self.f_max:g} Hz is above half the sample rate, {nyquist:g} Hz"
            )
        if self.f_min >= self.f_max_hz:
            raise ValueError(f"f_min {self.f_min:g} Hz is not below f_max {self.f_max_hz:g} Hz")
        if self.n_fft % 2:
            raise ValueError(f"n_fft {self.n_fft} is odd; it must be even")
        if self.win_length > self.n_fft:
            raise ValueError(f"win_length {self.win_length} is longer than n_fft {self.n_fft}")
        if self.hop_length > self.win_length:
            raise ValueError(
                f"hop_length {self.hop_length} is longer than win_length {self.win_length}: "
                "no frame would see the samples between"
            )
        if self.padding == "hop" and (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"padding 'hop' adds (n_fft - hop_length) / 2 samples, so n_fft {self.n_fft} and "
                f"hop_length {self.hop_length} must be both even or both odd"
            )
        return self

    @property
    def f_max_hz(self) -> float:
        """Upper edge of the highest band in Hz."""
        return self.sample_rate / 2 if self.f_max is None else self.f_max

    def n_frames(self, n_samples: int) -> int:
        """Frames of `n_samples` of audio; at least 1, as short audio is extended by zeros."""
        n_hops = n_samples // self.hop_length
        return 1 + n_hops if self.padding == "center" else max(1, n_hops)

    @property
    def margin_frames(self) -> int:
        """Frames at each side of a cut, made at a whole hop, that depend on the part cut off."""
        edge = edge_padding(self.n_fft, self.hop_length, self.padding)
        left = (self.n_fft - self.win_length) // 2 - edge
        last = 0 if self.padding == "center" else -self.hop_length
        right = left + self.win_length + last
        return -(-max(-left, right, 0) // self.hop_length)


MEL_PRESETS: dict[str, MelConfig] = {
    # NVIDIA/tacotron2 TacotronSTFT, also the mel of its WaveGlow.
    "nvidia": MelConfig(sample_rate=22050, padding="center"),
    # jik876/hifi-gan mel_spectrogram with center=False.
    "hifigan": MelConfig(sample_rate=22050, padding="hop", magnitude_floor=1e-9),
}
