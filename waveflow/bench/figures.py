"""What `waveflow bench` finds: settings in, figures out, as they stand in its JSON."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from waveflow.bench.calibration import Machine
from waveflow.bench.subjects import DEFAULT_SUBJECTS, PEERS
from waveflow.engine.decoder import Precision

# Calibration rates further apart than this, largest over smallest: no headline.
STEADY = 1.3
# Wall clock over CPU time of one thread, above which the machine was busy with other things.
BUSY = 1.1


class _Result(BaseModel):
    # JSON has no infinity: that of an equal path's SNR is written as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Settings(_Result):
    """What is measured.

    Attributes:
        models: names for `load_subject`.
        precisions: of the engine's paths.
        compile: whether compiled paths are measured too.
        peers: whether Vocos and Griffin-Lim are.
        device: torch's name.
        threads: CPU threads, which the caller has given torch.
        batch: items in a call.
        seconds: lengths of an item; each is measured by itself.
        runs: rounds, after a warm-up.
    """

    models: tuple[str, ...] = DEFAULT_SUBJECTS
    precisions: tuple[Precision, ...] = ("float32",)
    compile: bool = False
    peers: bool = True
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)
    seconds: tuple[float, ...] = (1.0,)
    runs: int = Field(default=5, ge=1)

    @property
    def uses_cpu_time(self) -> bool:
        """Whether the process's CPU time is the clock."""
        return self.threads == 1 and torch.device(self.device).type == "cpu"


class Quartiles(_Result):
    """Median and quartiles over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(low=float(low), median=float(median), high=float(high))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)}-{short(self.high)})"


class Model(_Result):
    """What is the same on all paths of a model.

    Attributes:
        name: as asked for.
        parameters: their number, of the model with weight norm folded; None without any.
        macs_per_second: multiply-adds for each second of audio, of the plain path.
        trained: whether it has weights from training.
        load_seconds: to read or make its weights.
    """

    name: str
    parameters: int | None
    macs_per_second: float | None
    trained: bool
    load_seconds: float


class FirstAudio(_Result):
    """How long a stream waits before it can play.

    Attributes:
        mel_seconds: of mel that must be there.
        compute_seconds: of work on it, median.
    """

    mel_seconds: float
    compute_seconds: float


class Row(_Result):
    """One path of one model at one length.

    Attributes:
        model, path, precision: which.
        prepare_seconds: to make the path from the loaded model.
        first_call_seconds: the warm-up: compilation, buffers, one synthesis.
        wall_seconds, cpu_seconds: of each round.
        times_real_time: seconds of audio for each second of the clock.
        times_real_time_wall: the same by the wall clock.
        ratio_to_plain: how many times as fast as the model's plain path.
        ratio_to_vocos: and as Vocos's plain path; None where it was not measured.
        ratio_to_fastest_vocos: and as the fastest path of Vocos, which has the engine's
            products and, if asked for, torch.compile.
        share: of the matmul rate of the same precision, counting the plain path's multiply-adds.
        snr_db: of the draw against the plain path's, same mel and noise; infinite where equal.
        memory_bytes: growth of the peak over the model in a fresh process; None where the
            system does not tell, or that process died.
        memory_process_died: whether it did, as where memory runs out.
        first_audio: of a stream, where there is one.
    """

    model: str
    path: str
    precision: Precision
    prepare_seconds: float
    first_call_seconds: float
    wall_seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    times_real_time: float
    times_real_time_wall: float
    ratio_to_plain: Quartiles
    ratio_to_vocos: Quartiles | None
    ratio_to_fastest_vocos: Quartiles | None
    share: float | None
    snr_db: float | None
    memory_bytes: int | None
    memory_process_died: bool
    first_audio: FirstAudio | None

    @property
    def waiting(self) -> float:
        """Wall clock over CPU time; with one CPU thread, above 1 the row waited for its core."""
        return sum(self.wall_seconds) / sum(self.cpu_seconds)


class Calibration(_Result):
    """Matrix products of one precision, timed in the same rounds.

    Attributes:
        precision: of the factors.
        routine: the fastest that torch has here.
        rates: operations per second in each round, a multiply-add counted as two.
    """

    precision: str
    routine: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        return max(self.rates) / min(self.rates)


class Section(_Result):
    """All rows of one length.

    Attributes:
        seconds: of an item of the batch, whole frames.
        calibrations: one for each precision.
        rows: in the order measured.
    """

    seconds: float
    calibrations: tuple[Calibration, ...]
    rows: tuple[Row, ...]

    @property
    def steady(self) -> bool:
        """Whether the machine was steady enough for a headline."""
        return all(calibration.spread <= STEADY for calibration in self.calibrations)

    def headlines(self) -> list[str]:
        """Each model's fastest path of each precision beside its plain one, and beside Vocos."""
        if not self.steady:
            return []
        fastest: dict[tuple[str, str], Row] = {}
        for row in sorted(self.rows, key=lambda row: row.times_real_time):
            if row.model not in PEERS:
                fastest[row.model, row.precision] = row
        return [_headline(row) for row in self.rows if row in fastest.values()]


class Quality(_Result):
    """What a path's copies of recordings are like.

    Attributes:
        model, path, precision: which.
        n_clips, seconds: recordings.
        log_mel_l1: mean distance of the copies' log-mels, nats.
        pesq: mean wideband PESQ of the copies.
    """

    model: str
    path: str
    precision: Precision
    n_clips: int
    seconds: float
    log_mel_l1: float
    pesq: float


class Part(_Result):
    """A share of the time of a synthesis, and its calls in one."""

    name: str
    share: float
    calls: int


class Profile(_Result):
    """Where a path spends its time.

    Attributes:
        model, path, precision: which.
        seconds: length of the audio.
        groups: kinds of operators; "outside torch" is what no operator accounts for.
        operators: the slowest.
        layers: by their role, of the plain path on a CPU; empty for others.
    """

    model: str
    path: str
    precision: Precision
    seconds: float
    groups: tuple[Part, ...]
    operators: tuple[Part, ...]
    layers: tuple[Part, ...]


class Benchmark(_Result):
    """Result of `benchmark`.

    Attributes:
        machine, settings: what was measured, and on what.
        models: one for each model and peer.
        sections: one for each length.
        left_out: paths that cannot be run here, and why.
        quality: of trained models, where recordings were given.
        profiles: where they were asked for.
    """

    machine: Machine
    settings: Settings
    models: tuple[Model, ...]
    sections: tuple[Section, ...]
    left_out: tuple[str, ...]
    quality: tuple[Quality, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return self.model_dump_json(indent=1)


def short(value: float) -> str:
    """A ratio or a speed to about three digits, never with an exponent."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.3g}"


def _headline(row: Row) -> str:
    line = f"{row.model}, {row.path}: {short(row.times_real_time)} x real time"
    if row.snr_db is not None:
        output = "equal output" if math.isinf(row.snr_db) else f"{row.snr_db:.0f} dB"
        line += f", {short(row.ratio_to_plain.median)} x plain ({output})"
    if row.ratio_to_vocos is not None and row.ratio_to_fastest_vocos is not None:
        fastest = short(row.ratio_to_fastest_vocos.median)
        line += f", {row.ratio_to_vocos} x Vocos, {fastest} x its fastest"
    return line
