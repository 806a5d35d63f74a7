"""Settings of mel spectrograms. Nothing here imports torch, so commands can read them at once."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from waveflow.limits import HOP_LENGTH, N_FFT, N_MELS, SAMPLE_RATE

Padding = Literal["center", "hop"]
PadMode = Literal["reflect", "constant"]
Window = Literal["periodic", "symmetric"]
FloorMode = Literal["clamp", "add"]
Log = Literal["e", "2", "10", "db", "none"]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_LIMITS = {"sample_rate": SAMPLE_RATE, "n_fft": N_FFT, "hop_length": HOP_LENGTH, "n_mels": N_MELS}


def edge_padding(n_fft: int, hop_length: int, padding: Padding) -> int:
    """Samples that the framing adds at each side of the audio, see `waveflow.audio.stft`."""
    return n_fft // 2 if padding == "center" else (n_fft - hop_length) // 2


class MelConfig(BaseModel):
    """Settings of a mel spectrogram, on all that systems differ in.

        linear = gain filterbank . |STFT|^power
        mel    = clip(scale log(max(linear, log_floor)) + offset)

    The window is Hann's; one shorter than n_fft sits in the middle of its frame. Models take
    natural logarithms without a scale (`model_problem`); mels of other values are converted
    (`waveflow.audio.conversion`). Fields that came later (from `window` on) are written only where
    they differ from their defaults, so old checkpoints keep their bytes.

    Example:
        >>> MelConfig(sample_rate=22050).n_frames(22050)
        86
        >>> MEL_PRESETS["coqui"].log
        'db'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_rate: int = Field(gt=0, description="Hz")
    n_fft: int = Field(default=1024, gt=1)
    hop_length: int = Field(default=256, gt=0)
    win_length: int = Field(default=1024, gt=0)
    n_mels: int = Field(default=80, gt=0)
    f_min: float = Field(default=0.0, ge=0, description="Hz, lower edge of the lowest band")
    f_max: Finite | None = Field(
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
        description="Of |STFT|^2, under the root",
    )
    log_floor: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    window: Window = Field(default="periodic", description="Symmetric: its last value is its first")
    preemphasis: float = Field(default=0.0, ge=0, lt=1, description="x[t] - preemphasis x[t - 1]")
    magnitude_floor_mode: FloorMode = "add"
    gain: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Of the linear mel; int16 audio: 32768"
    )
    log_floor_mode: FloorMode = "clamp"
    log: Log = Field(default="e", description="Base; db: decibels of amplitude; none: linear")
    scale: Finite | tuple[Finite, ...] = Field(
        default=1.0, description="Of the logarithm; one for all bands, or one for each"
    )
    offset: Finite | tuple[Finite, ...] = Field(default=0.0, description="As scale, in its unit")
    clip: tuple[Finite, Finite] | None = Field(
        default=None, description="Least and greatest value in the end"
    )

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = {name: field.default for name, field in _later_fields().items()}
        written = handler(self)
        return {k: v for k, v in written.items() if k not in later or v != later[k]}

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
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_mels:
                raise ValueError(f"{name} has {len(value)} values for {self.n_mels} mel bands")
        if 0 in (self.scale if isinstance(self.scale, tuple) else (self.scale,)):
            raise ValueError("scale is 0: nothing of the mel would be left")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip {self.clip[0]:g} is not below {self.clip[1]:g}")
        return self

    @property
    def natural(self) -> "MelConfig":
        """The same spectra as plain natural logarithms."""
        plain = {"log": "e", "scale": 1.0, "offset": 0.0, "clip": None}
        return self.model_copy(update=plain)

    @property
    def model_problem(self) -> str:
        """Why no model can be trained on such mels, in words; empty if one can."""
        own = {"log": "e", "scale": 1.0, "offset": 0.0, "clip": None, "gain": 1.0}
        for name, value in (own | {"preemphasis": 0.0}).items():
            if getattr(self, name) != value:
                return (
                    f"mel.{name} is {getattr(self, name)}: models take natural logarithms as they "
                    "are; leave it out, and convert mels that come otherwise (--convention)"
                )
        return ""

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


def _later_fields() -> dict[str, Any]:
    """The fields of a MelConfig that its first version had not."""
    names = list(MelConfig.model_fields)
    return {name: MelConfig.model_fields[name] for name in names[names.index("window") :]}


# jik876/hifi-gan mel_spectrogram with center=False; also Matcha-TTS's and Grad-TTS's.
_HIFIGAN = MelConfig(sample_rate=22050, magnitude_floor=1e-9)
# NVIDIA/tacotron2 TacotronSTFT, also the mel of its WaveGlow and of ming024's FastSpeech 2.
_NVIDIA = MelConfig(sample_rate=22050, padding="center")
# kan-bayashi/ParallelWaveGAN preprocess, recipe for LJSpeech.
_WAVEGAN = MelConfig(
    sample_rate=22050, f_min=80, f_max=7600, padding="center", log="10", log_floor=1e-10
)


def _changed(config: MelConfig, **fields: Any) -> MelConfig:
    return MelConfig.model_validate(config.model_dump() | fields)


# Each was compared with the system's own code; see the table in docs/development.md.
MEL_PRESETS: dict[str, MelConfig] = {
    "nvidia": _NVIDIA,
    "hifigan": _HIFIGAN,
    "bigvgan-22k": _changed(_HIFIGAN, f_max=None),
    "bigvgan-24k": _changed(_HIFIGAN, sample_rate=24000, n_mels=100, f_max=None),
    "bigvgan-44k": _changed(
        _HIFIGAN,
        sample_rate=44100,
        n_fft=2048,
        hop_length=512,
        win_length=2048,
        n_mels=128,
        f_max=None,
    ),
    "vocos": MelConfig(
        sample_rate=24000,
        n_mels=100,
        f_max=None,
        padding="center",
        mel_scale="htk",
        norm=None,
        log_floor=1e-7,
    ),
    "nemo-fastpitch": _changed(
        _NVIDIA, pad_mode="constant", window="symmetric", log_floor_mode="add"
    ),
    "nemo-hifigan": _changed(_NVIDIA, padding="hop", pad_mode="constant", window="symmetric"),
    # 20 log10, minus the reference of 20 dB, 100 dB of range to [-4, 4].
    "coqui": _changed(
        _NVIDIA, f_max=None, log_floor=1e-8, log="db", scale=0.08, offset=2.4, clip=(-4, 4)
    ),
    "coqui-log": _changed(_NVIDIA, log_floor=1e-8),
    "torchaudio-griffinlim": _NVIDIA,
    # What its vocoder makes of Tacotron 2's natural logarithms: 100 dB of range to [0, 1].
    "torchaudio-wavernn": _changed(
        _NVIDIA,
        n_fft=2048,
        hop_length=275,
        win_length=1100,
        f_min=40,
        f_max=None,
        log="db",
        scale=0.01,
        offset=1.0,
        clip=(0, 1),
    ),
    # espnet2 LogMelFbank; it also clamps the power of each bin.
    "espnet": _changed(_WAVEGAN, magnitude_floor=1e-10, magnitude_floor_mode="clamp"),
    "parallel-wavegan": _WAVEGAN,
    "speecht5": _changed(_WAVEGAN, sample_rate=16000),
    # The model comes from ESPnet's; it gives mels before its vocoder's own mean and deviation.
    "fastspeech2conformer": _changed(_WAVEGAN, magnitude_floor=1e-10, magnitude_floor_mode="clamp"),
}
