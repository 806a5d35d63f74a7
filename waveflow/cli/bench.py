"""`waveflow bench`: how fast models are here, on every path that can run them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import counting, note
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from waveflow.bench.benchmark import Contenders
    from waveflow.bench.figures import Benchmark, Settings


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Models that ship, folders of a checkpoint or run, or untrained sizes: "
            "waveglow-256, waveglow-64, squeezewave-128-256, squeezewave-128-128, "
            "squeezewave-256-256, squeezewave-256-128 (samples in a vector, channels). "
            "Without it: the default model and waveglow-256.",
        ),
    ] = None,
    precision: Annotated[
        list[options.PrecisionName] | None,
        typer.Option("--precision", help="Of the engine; may be repeated. Without it: float32."),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also measure torch.compile, in each precision.")
    ] = False,
    device: options.Device = "cpu",
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=1024, metavar="N", help="CPU threads.")
    ] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Items in a call.")] = 1,
    seconds: Annotated[
        list[float] | None,
        typer.Option(
            "--seconds",
            min=0.05,
            max=600,
            metavar="X",
            help="Length of an item; may be repeated. Without it: 1.",
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option("--runs", min=1, metavar="N", help="Rounds, after one to warm up.")
    ] = 5,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Measure Vocos and Griffin-Lim too.")
    ] = True,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Recordings: what each path of a trained model costs in quality (log-mel L1, "
            "PESQ).",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write all figures as JSON."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Also draw the speeds (.png, .svg, .pdf)."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where each path spends its time.")
    ] = False,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Measure instead a WaveGlow's training step, activations kept or rebuilt.",
        ),
    ] = False,
) -> None:
    """Measures speed, memory and latency of models here, all in one run.

    Each model runs as published (weight norm on), plain (eager float32, weight norm
    folded), and by the engine in each precision. Paths take turns in one process, in
    reversed order every second round. Ratios are medians (quartiles) over rounds, to
    the plain path; with one thread, of CPU time. "share" is of the rate of matrix
    products in the same precision and run, "SNR" against the plain path with the same
    noise, "MB" the growth of the peak in a fresh process, "first audio" the seconds of
    mel that a stream needs and of work until its first audio, "ready" those of making a
    path and of its first call. No gradients are kept.

    \b
    Examples:
      waveflow bench
      waveflow bench waveglow-256 --precision float32 --precision int8 --seconds 4
      waveflow bench runs/x --data recordings/ --json figures.json
      waveflow bench waveglow-256 --training --device cuda --batch 3
    """
    # Before torch is imported, for libraries that read it once; the profiler's log is noise.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for path in (json_file, picture):
        if path is not None:
            options.check_writable(path)
    if picture is not None:
        _check_picture(picture)
    if options.PrecisionName.auto in (precision or ()):
        raise ConfigError("--precision auto: give those to be measured, such as float32 and int8")
    options.set_threads(threads)
    options.check_device(device)
    if training:
        if precision or compile or data or picture or profile:
            raise ConfigError(
                "--training goes with --device, --threads, --batch, --seconds, --runs and --json "
                "alone: leave out what else was given"
            )
        from waveflow.cli.bench_training import bench_training

        bench_training(models or (), device, batch, seconds or (), runs, json_file)
        return

    from waveflow.bench.benchmark import prepare_contenders
    from waveflow.bench.figures import Settings
    from waveflow.cli.bench_report import draw, print_benchmark
    from waveflow.files import atomic_path

    chosen = {
        "models": tuple(models or ()),
        "precisions": tuple(p.value for p in precision or ()),
        "seconds": tuple(seconds or ()),
    }
    settings = Settings.model_validate(
        {name: value for name, value in chosen.items() if value}
        | {"compile": compile, "peers": peers, "device": device}
        | {"threads": threads, "batch": batch, "runs": runs}
    )
    result = _measured(settings, prepare_contenders(settings), data, profile)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(result.to_json() + "\n", encoding="utf-8")
    if picture is not None:
        with atomic_path(picture) as temporary:
            draw(result, temporary)
    print_benchmark(result)
    for reason in result.left_out:
        note(f"left out: {reason}")


def _measured(
    settings: "Settings", contenders: "Contenders", data: Path | None, profile: bool
) -> "Benchmark":
    """Quality first, so that what is missing for it is found before the long work."""
    from waveflow.bench.benchmark import benchmark
    from waveflow.bench.profiling import profile as profiled
    from waveflow.bench.quality import measure_quality, read_clips

    quality = []
    if data is not None:
        trained = [c for c in contenders.made if c.subject.trained]
        if not trained:
            raise ConfigError("--data measures trained models: give one, or leave it")
        for contender in trained:
            clips = read_clips(data, contender.subject.mel_config.sample_rate)
            quality.append(measure_quality(contender, clips))
    with counting("steps") as progress:
        result = benchmark(settings, contenders, progress)
    profiles = [profiled(settings, contender) for contender in contenders.made if profile]
    return result.model_copy(update={"quality": tuple(quality), "profiles": tuple(profiles)})


def _check_picture(path: Path) -> None:
    """Raises ConfigError before the long work, where the picture could not be drawn after it."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--picture {path}: give a name that ends in .png, .svg or .pdf")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib: pip install 'waveflow[plot]'") from error
