"""How a benchmark is shown: tables, notes and a picture."""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from waveflow.bench.figures import Benchmark, Model, Part, Profile, Quality, Row, Section

# All columns at their widest; a terminal's own width is taken where there is one.
PAGE_WIDTH = 120
COLUMNS = (
    "M param",
    "GMAC/s",
    "x real time",
    "wall",
    "to plain",
    "to Vocos",
    "share",
    "SNR dB",
    "MB",
    "first audio",
    "ready s",
)
# Parts of a profile that are worth a line.
LEAST_SHARE = 0.01
NAME_WIDTH = 22


def print_benchmark(result: "Benchmark") -> None:
    """All tables on stdout, without the blanks that fill a table's lines."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PAGE_WIDTH, highlight=False)
    with console.capture() as capture:
        _print_benchmark(console, result)
    for line in capture.get().splitlines():
        print(line.rstrip())


def _print_benchmark(console: "Console", result: "Benchmark") -> None:
    models = {model.name: model for model in result.models}
    for line in _machine_lines(result):
        console.print(line, soft_wrap=True)
    for section in result.sections:
        console.print(_speed_table(section, models, result.settings.batch))
        for line in _notes(section, result.settings.uses_cpu_time):
            console.print(line, soft_wrap=True)
    if result.quality:
        console.print(_quality_table(result.quality))
    for profile in result.profiles:
        console.print(_profile_table(profile))


def draw(result: "Benchmark", path: Path) -> None:
    """Bars of the times real time of every row, one panel for each length."""
    from matplotlib.figure import Figure

    n_rows = max(len(section.rows) for section in result.sections)
    size = (5 + 3 * len(result.sections), 1.2 + 0.3 * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(result.sections), sharey=True, squeeze=False)[0]
    for panel, section in zip(panels, result.sections, strict=True):
        names = [f"{row.model}, {row.path}" for row in section.rows]
        speeds = [row.times_real_time for row in section.rows]
        models = list(dict.fromkeys(row.model for row in section.rows))
        colours = [f"C{models.index(row.model) % 10}" for row in section.rows]
        bars = panel.barh(range(len(names)), speeds, color=colours)
        panel.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=3)
        panel.set_yticks(range(len(names)), names)
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.set_xlabel("times real time")
        panel.set_title(f"{section.seconds:g} s")
        panel.axvline(1, color="black", linewidth=0.8)
    panels[0].invert_yaxis()
    figure.suptitle(f"{result.machine.processor}, {result.machine.device}, {_threads(result)}")
    # The name's own suffix is that of a temporary file.
    figure.savefig(path, format=path.suffix[1:], dpi=150)


def _machine_lines(result: "Benchmark") -> list[str]:
    machine = result.machine
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    return [
        f"{machine.device}; {machine.processor}, {_threads(result)}: "
        f"{' '.join(machine.cpu_flags) or 'flags unknown'}",
        libraries,
        "no gradients; weight norm folded but for `published`; "
        f"{result.settings.runs} rounds after a warm-up; speeds without loading and compiling",
    ]


def _threads(result: "Benchmark") -> str:
    n = result.machine.threads
    return f"{n} thread" if n == 1 else f"{n} threads"


def _speed_table(section: "Section", models: dict[str, "Model"], batch: int) -> "Table":
    """A line for each model, and one for each of its paths."""
    from rich.table import Table

    title = f"{section.seconds:g} s of audio" + (f", batch of {batch}" if batch > 1 else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in section.rows:
        if row.model != last:
            last = row.model
            model = models[row.model]
            table.add_row(
                f"[bold]{_ending(row.model)}[/]",
                _number(model.parameters, 1e6),
                _number(model.macs_per_second, 1e9),
            )
        table.add_row(*_cells(row))
    return table


def _cells(row: "Row") -> list[str]:
    from waveflow.bench.figures import short

    to_vocos, first = row.ratio_to_vocos, row.first_audio
    return [
        f"  {row.path}",
        "",
        "",
        short(row.times_real_time),
        short(row.times_real_time_wall),
        "1" if row.snr_db is None else str(row.ratio_to_plain),
        "" if to_vocos is None else short(to_vocos.median),
        "" if row.share is None else f"{100 * row.share:.0f} %",
        "" if row.snr_db is None else _decibels(row.snr_db),
        _number(row.memory_bytes, 1e6),
        "" if first is None else f"{first.mel_seconds:.2f}+{first.compute_seconds:.3f}",
        f"{row.prepare_seconds + row.first_call_seconds:.2f}",
    ]


def _ending(name: str) -> str:
    """A name, or the end of a folder's long path."""
    return name if len(name) <= NAME_WIDTH else "..." + name[3 - NAME_WIDTH :]


def _decibels(snr_db: float) -> str:
    return "equal" if math.isinf(snr_db) else f"{snr_db:.0f}"


def _number(value: float | None, unit: float) -> str:
    from waveflow.bench.figures import short

    return "" if value is None else short(value / unit)


def _notes(section: "Section", uses_cpu_time: bool) -> list[str]:
    """The calibration, what disturbed, and the headlines."""
    from waveflow.bench.figures import BUSY, STEADY

    lines = [
        f"{c.precision} matrix products ({c.routine}): {c.median / 1e9:.0f} billion operations a "
        f"second, spread {c.spread:.2f}"
        for c in section.calibrations
    ]
    if uses_cpu_time:
        lines += [
            f"machine busy during {row.model}, {row.path}: the wall clock ran {row.waiting:.2f} "
            "times as long as the CPU's"
            for row in section.rows
            if row.waiting > BUSY
        ]
    lines += [
        f"no memory figure of {row.model}, {row.path}: its process died, perhaps for want of memory"
        for row in section.rows
        if row.memory_process_died
    ]
    if section.steady:
        lines += section.headlines()
    else:
        lines.append(f"no headline: the matrix products spread by more than {STEADY:g}")
    return [*lines, ""]


def _quality_table(rows: Sequence["Quality"]) -> "Table":
    from rich.table import Table

    first = rows[0]
    table = Table(
        "",
        title=f"copies of {first.n_clips} recordings, {first.seconds:.0f} s",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("log-mel L1", justify="right")
    table.add_column("PESQ-WB", justify="right")
    for row in rows:
        table.add_row(f"{row.model}, {row.path}", f"{row.log_mel_l1:.4f}", f"{row.pesq:.3f}")
    return table


def _profile_table(profile: "Profile") -> "Table":
    """Kinds of operators, operators and layers side by side, each the slowest first."""
    from rich.table import Table

    table = Table(
        title=f"profile of {profile.model}, {profile.path}, {profile.seconds:g} s",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    lists = {
        "by kind": profile.groups,
        "by operator": profile.operators,
        "by layer": profile.layers,
    }
    shown = {
        title: [_part(part) for part in parts if part.share >= LEAST_SHARE]
        for title, parts in lists.items()
        if parts
    }
    for title in shown:
        table.add_column(title, no_wrap=True)
    for cells in itertools.zip_longest(*shown.values(), fillvalue=""):
        table.add_row(*cells)
    return table


def _part(part: "Part") -> str:
    name = part.name if len(part.name) <= NAME_WIDTH else part.name[: NAME_WIDTH - 3] + "..."
    calls = f" ({part.calls})" if part.calls else ""
    return f"{100 * part.share:3.0f} % {name}{calls}"
