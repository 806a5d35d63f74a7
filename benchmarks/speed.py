"""Speed of models and of other vocoders, on every path, all in one run.

    python benchmarks/speed.py frameglow-cc0 waveglow-256 --precision float32 bfloat16 int8 \\
        --seconds 1 4

All paths take turns in one process, and matrix products of each precision among them. Ratios are
medians over the rounds. "share" is the rate of multiply-adds, counted on the plain path, over the
rate of the products in the same precision; in int8 these are torch._int_mm, which is slow without
VNNI: shares are then above 100 %. "x Vocos" is to Vocos's plain path and to Vocos with
this engine's products.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lab
from waveflow.cli.bench import short
from waveflow.cli.console import show_table
from waveflow.engine.cost import (
    COUNTED_FRAMES,
    count_parameters,
    macs_per_frame,
    macs_per_second,
    speed_ratio,
    take_turns,
    timed,
)
from waveflow.engine.fast.product import Product
from waveflow.engine.vocoder import Vocoder
from waveflow.metrics.spectral import signal_to_noise_db

# Rows, inner and columns, as of a coupling network over a block of rows.
PRODUCT_SHAPE = (1024, 768, 512)
# So many products take some tens of milliseconds on one CPU thread.
N_PRODUCTS = 10
COLUMNS = ("model", "path", "x real time", "x plain", "x Vocos", "share", "SNR dB")


class Products(NamedTuple):
    """Matrix products of one precision: work to time, and its operations."""

    work: Callable[[], None]
    operations: int


def products(precision: str, device: str) -> Products:
    """On a CPU by the engine's routine, elsewhere by torch's; a multiply-add is two operations."""
    rows, inner, columns = PRODUCT_SHAPE
    dtype = getattr(torch, precision)
    left = torch.ones(rows, inner, device=device).to(dtype)
    right = torch.ones(inner, columns, device=device).to(dtype)
    product: Callable[[Tensor], Tensor] = partial(torch.mm, mat2=right)
    if dtype == torch.int8:
        product = partial(torch._int_mm, mat2=right)
    elif device == "cpu":
        product = Product(right.T, dtype, rows)

    def work() -> None:
        for _ in range(N_PRODUCTS):
            result = product(left)
        result[0, 0].item()  # waits for an accelerator

    return Products(work, 2 * rows * inner * columns * N_PRODUCTS)


def macs(system: Any) -> float | None:
    """Multiply-adds for each second of audio; None without a network."""
    if isinstance(system, Vocoder):
        return macs_per_second(system)
    if not isinstance(system, nn.Module):
        return None
    config: Any = system.mel_config
    mel = torch.zeros(
        1, config.n_mels, max(COUNTED_FRAMES), device=next(system.parameters()).device
    )
    return macs_per_frame(system, mel) * config.sample_rate / config.hop_length


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the machine, the models' costs, and a table for each length."""
    args = lab.parser(__doc__, *lab.OPTIONS).parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{lab.machine()}, {args.threads} CPU threads, {args.device}")
    with lab.folders([*args.models, *(() if args.no_peers else lab.PEERS)]) as found:
        systems = lab.load_all(found, args.precision, args.compile, args.device)
    costs = {model: macs(systems[model, lab.PLAIN]) for model in found}
    for model, cost in costs.items():
        if cost is not None:
            plain = systems[model, lab.PLAIN]
            n_parameters = count_parameters(getattr(plain, "flow", plain))
            print(f"{model}: {n_parameters / 1e6:.3g} M parameters, {cost / 1e9:.3g} GMAC/s")
    rates = {p: products(p, args.device) for p in dict.fromkeys(["float32", *args.precision])}
    for seconds in args.seconds:
        print(f"\n{seconds:g} s of audio")
        table(systems, costs, rates, seconds, args.runs, args.device)


def table(
    systems: dict[tuple[str, str], Any],
    costs: dict[str, float | None],
    rates: dict[str, Products],
    seconds: float,
    runs: int,
    device: str,
) -> None:
    """Measures and prints one length of audio."""

    def synthesis(system: lab.System, mel: Tensor) -> None:
        system(mel).cpu()  # waits for an accelerator

    mels = {key: lab.speech(system.mel_config, seconds, device) for key, system in systems.items()}
    works = {("products", precision): timed(rate.work, device) for precision, rate in rates.items()}
    for key, system in systems.items():
        works[key] = timed(partial(synthesis, system, mels[key]), device)
    times = take_turns(works, runs)
    for precision, rate in rates.items():
        own = times["products", precision]
        print(
            f"{precision} products: {rate.operations / statistics.median(own) / 1e9:.0f} billion "
            f"operations a second, slowest over fastest round {max(own) / min(own):.2f}"
        )
    rows = [COLUMNS]
    draws: dict[str, Tensor] = {}
    for (model, path), system in systems.items():
        own = times[model, path]
        plain_times = times[model, lab.PLAIN]
        config = system.mel_config
        audio_seconds = mels[model, path].shape[2] * config.hop_length / config.sample_rate
        draw = getattr(system, "draw", system)(mels[model, path])
        plain = draws.setdefault(model, draw)
        to_vocos = [speed_ratio(times[k], own).median for k in times if k[0] == lab.VOCOS]
        share, precision = "", path.split()[-1] if " " in path else "float32"
        if cost := costs[model]:
            operations = 2 * cost * audio_seconds / rates[precision].operations
            ratio = speed_ratio(times["products", precision], own).median
            share = f"{100 * operations * ratio:.0f} %"
        rows.append(
            (
                model,
                path,
                short(audio_seconds / statistics.median(own)),
                "1" if plain is draw else str(speed_ratio(plain_times, own)),
                " / ".join(f"{ratio:.2f}" for ratio in to_vocos),
                share,
                "" if plain is draw else f"{signal_to_noise_db(plain, draw):.0f}",
            )
        )
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
