"""Speed, memory and latency of models and of the paths that run them, in one honest run.

Ratios of two runs mean little on a machine that others use too. Here all paths take turns in one
process, in reversed order every second round; a ratio is taken within each round, and its median
and quartiles over the rounds are given. Matrix products of each precision take their turns among
them: they tell what the machine could have done, and whether it was steady.

With one CPU thread the clock is the process's own CPU time, which waiting for the core does not
lengthen; with more, or on an accelerator, only the wall clock is valid.
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch
from torch import Tensor

from waveflow.bench.calibration import Matmul, Timing, describe_machine, matmul, timed
from waveflow.bench.figures import (
    Benchmark,
    Calibration,
    FirstAudio,
    Model,
    Quartiles,
    Row,
    Section,
    Settings,
)
from waveflow.bench.memory import memory_growth
from waveflow.bench.subjects import (
    PEERS,
    PLAIN,
    VOCOS,
    RunPath,
    Subject,
    System,
    load_subject,
    speech_mel,
)
from waveflow.engine.cost import count_parameters
from waveflow.engine.vocoder import VocoderWarning
from waveflow.errors import ConfigError
from waveflow.metrics.spectral import signal_to_noise_db

# A stream is fed chunks of so many frames, 0.05 seconds at the usual hop.
STREAM_CHUNK = 4
# Its first audio is waited for so many times, and not again once that took so many seconds.
STREAM_RUNS, STREAM_ENOUGH = 3, 1.0


class Contender(NamedTuple):
    """A path of a model, ready to run."""

    subject: Subject
    path: RunPath
    system: System
    prepare_seconds: float


class Contenders(NamedTuple):
    """What is measured.

    Attributes:
        made: every path that can be run here.
        left_out: the others, and why.
        load_seconds: by model.
    """

    made: list[Contender]
    left_out: list[str]
    load_seconds: dict[str, float]


Progress = Callable[[int, int], None]
Tick = Callable[[], None]


def prepare_contenders(settings: Settings) -> Contenders:
    """Loads the models and makes their paths.

    A path that this device or installation does not have is left out.

    Raises:
        CheckpointError: a model that does not exist.
    """
    contenders = Contenders([], [], {})
    for name in dict.fromkeys((*settings.models, *(PEERS if settings.peers else ()))):
        begin = time.perf_counter()
        subject = load_subject(name, torch.device(settings.device))
        contenders.load_seconds[name] = time.perf_counter() - begin
        for path in subject.paths(settings.precisions, settings.compile):
            begin = time.perf_counter()
            try:
                system = subject.system(path)
            except ConfigError as error:
                contenders.left_out.append(f"{name}, {path.label}: {error}")
                continue
            seconds = time.perf_counter() - begin
            contenders.made.append(Contender(subject, path, system, seconds))
    return contenders


@torch.inference_mode()
def benchmark(
    settings: Settings, contenders: Contenders, progress: Progress | None = None
) -> Benchmark:
    """Measures every path of every model at every length.

    Args:
        settings: what the contenders were made for.
        contenders: see `prepare_contenders`.
        progress: called with (rounds and rows done, in all).
    """
    made = contenders.made
    total = len(made) + len(settings.seconds) * (1 + settings.runs + len(made))
    done = itertools.count(1)

    def tick() -> None:
        if progress:
            progress(next(done), total)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VocoderWarning)
        models = _models(contenders)
        streams = [_first_audio(settings, contender, tick) for contender in made]
        sections = tuple(
            _section(settings, made, models, streams, seconds, tick) for seconds in settings.seconds
        )
    return Benchmark(
        machine=describe_machine(torch.device(settings.device)),
        settings=settings,
        models=tuple(models.values()),
        sections=sections,
        left_out=tuple(contenders.left_out),
    )


def frames(subject: Subject, seconds: float) -> int:
    """Mel frames of a length, at least one."""
    return max(1, round(seconds * subject.mel_config.sample_rate / subject.mel_config.hop_length))


def _models(contenders: Contenders) -> dict[str, Model]:
    subjects = {c.subject.name: c.subject for c in contenders.made}
    return {
        name: Model(
            name=name,
            parameters=None if subject.module is None else count_parameters(subject.module),
            macs_per_second=subject.macs_per_second(),
            trained=subject.trained,
            load_seconds=contenders.load_seconds[name],
        )
        for name, subject in subjects.items()
    }


def _first_audio(settings: Settings, contender: Contender, tick: Tick) -> FirstAudio | None:
    """The latency of a stream, after a first run to warm up."""
    config = contender.subject.mel_config
    chunk = speech_mel(config, STREAM_CHUNK, 1)[0].to(settings.device)
    n_read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal n_read
        while True:
            n_read += 1
            yield chunk

    def wait() -> None:
        nonlocal n_read
        n_read = 0
        stream = contender.system.stream(endless())
        if stream is not None:
            next(stream).cpu()

    wait()
    seconds: list[float] = []
    while len(seconds) < STREAM_RUNS and sum(seconds) < STREAM_ENOUGH:
        seconds.append(_clock(settings, timed(wait)))
    tick()
    if n_read == 0:
        return None
    return FirstAudio(
        mel_seconds=n_read * STREAM_CHUNK * config.hop_length / config.sample_rate,
        compute_seconds=statistics.median(seconds),
    )


class _Entry:
    """A contender at one length, and its timings.

    Attributes:
        contender, mel: what is run on what, (B, M, F).
        audio_seconds: what one run makes, all items together.
        first_call: the warm-up, on the wall clock.
        timings: of the rounds.
    """

    def __init__(self, settings: Settings, contender: Contender, seconds: float) -> None:
        config = contender.subject.mel_config
        n_frames = frames(contender.subject, seconds)
        self.settings = settings
        self.contender = contender
        self.mel = speech_mel(config, n_frames, settings.batch).to(settings.device)
        self.audio_seconds = settings.batch * n_frames * config.hop_length / config.sample_rate
        self.first_call = timed(self.run).wall
        self.timings: list[Timing] = []

    def run(self) -> None:
        # Copied, or an accelerator would still be at work when the clock is read.
        self.contender.system(self.mel).cpu()

    @property
    def times(self) -> list[float]:
        return [_clock(self.settings, timing) for timing in self.timings]

    def ratio_to(self, other: "_Entry") -> Quartiles:
        """How many times as fast as another, round by round, for each second of audio."""
        per_second = other.audio_seconds / self.audio_seconds
        return Quartiles.of(
            [theirs / own / per_second for own, theirs in zip(self.times, other.times, strict=True)]
        )

    def share_of(self, calibration: Calibration, macs_per_second: float) -> float:
        """The rate reached over that of the matrix products, round by round, median."""
        operations = 2 * macs_per_second * self.audio_seconds
        return statistics.median(
            operations / time / rate
            for time, rate in zip(self.times, calibration.rates, strict=True)
        )

    def snr_db(self, reference: "_Entry") -> float | None:
        """Of the draw; None for the reference itself."""
        if self is reference:
            return None
        return signal_to_noise_db(
            reference.contender.system.draw(self.mel), self.contender.system.draw(self.mel)
        )

    def memory(self) -> tuple[int | None, bool]:
        """Bytes, where they could be measured, and whether the process for it died."""
        try:
            grown = memory_growth(
                self.contender.subject.name,
                self.contender.path,
                self.mel.shape[2],
                self.settings.batch,
                self.settings.device,
                self.settings.threads,
            )
        except BrokenProcessPool:
            return None, True
        return grown, False


def _section(
    settings: Settings,
    contenders: Sequence[Contender],
    models: Mapping[str, Model],
    streams: Sequence[FirstAudio | None],
    seconds: float,
    tick: Tick,
) -> Section:
    """All contenders at one length."""
    device = torch.device(settings.device)
    precisions = dict.fromkeys(("float32", *settings.precisions))
    matmuls: dict[str, Matmul] = {
        precision: product
        for precision in precisions
        if (product := matmul(precision, device)) is not None
    }
    entries = [_Entry(settings, contender, seconds) for contender in contenders]
    tick()
    products: dict[str, list[Timing]] = {precision: [] for precision in matmuls}
    for n_done in range(settings.runs):
        turns = [(timings, matmuls[p].work) for p, timings in products.items()]
        turns += [(entry.timings, entry.run) for entry in entries]
        for timings, work in turns if n_done % 2 == 0 else reversed(turns):
            timings.append(timed(work))
        tick()
    calibrations = {
        precision: Calibration(
            precision=precision,
            routine=matmuls[precision].routine,
            rates=tuple(matmuls[precision].operations / _clock(settings, t) for t in timings),
        )
        for precision, timings in products.items()
    }
    rows = []
    for entry, stream in zip(entries, streams, strict=True):
        rows.append(_row(entry, entries, models, calibrations, stream))
        tick()
    return Section(
        seconds=seconds,
        calibrations=tuple(calibrations.values()),
        rows=tuple(rows),
    )


def _row(
    entry: _Entry,
    entries: Sequence[_Entry],
    models: Mapping[str, Model],
    calibrations: Mapping[str, Calibration],
    stream: FirstAudio | None,
) -> Row:
    subject, path, _, prepare_seconds = entry.contender
    plain = {e.contender.subject.name: e for e in entries if e.contender.path == PLAIN}
    reference, vocos = plain[subject.name], plain.get(VOCOS)
    fastest_vocos = min(
        (e for e in entries if e.contender.subject.name == VOCOS),
        key=lambda entry: statistics.median(entry.times),
        default=None,
    )
    macs = models[subject.name].macs_per_second
    calibration = calibrations.get(path.precision)
    walls = [timing.wall for timing in entry.timings]
    memory_bytes, memory_process_died = entry.memory()
    return Row(
        model=subject.name,
        path=path.label,
        precision=path.precision,
        prepare_seconds=prepare_seconds,
        first_call_seconds=entry.first_call,
        wall_seconds=tuple(walls),
        cpu_seconds=tuple(timing.cpu for timing in entry.timings),
        times_real_time=entry.audio_seconds / statistics.median(entry.times),
        times_real_time_wall=entry.audio_seconds / statistics.median(walls),
        ratio_to_plain=entry.ratio_to(reference),
        ratio_to_vocos=None if vocos is None else entry.ratio_to(vocos),
        ratio_to_fastest_vocos=None if fastest_vocos is None else entry.ratio_to(fastest_vocos),
        share=None if calibration is None or macs is None else entry.share_of(calibration, macs),
        snr_db=entry.snr_db(reference),
        memory_bytes=memory_bytes,
        memory_process_died=memory_process_died,
        first_audio=stream,
    )


def _clock(settings: Settings, timing: Timing) -> float:
    return timing.cpu if settings.uses_cpu_time else timing.wall
