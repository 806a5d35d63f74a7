"""Where a synthesis spends its time: the slowest of torch's operators on every path.

    python benchmarks/hot_spots.py frameglow-cc0 --precision float32 int8 --seconds 4

Work in another library (int8 runs in OpenVINO) and between operators is "outside torch".
"""

import time
from collections.abc import Sequence

import torch

import lab

N_OPERATORS = 12
# Words in the names of operators that are matrix products or convolutions.
PRODUCTS = ("mm", "linear", "conv", "waveflow::product")


@torch.inference_mode()
def profile(system: lab.System, seconds: float) -> list[str]:
    """Shares of the time of one synthesis under torch's profiler, after one to warm up."""
    mel = lab.speech(system.mel_config, seconds)
    system(mel)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        system(mel)
        total = 1e6 * (time.perf_counter() - begin)
    found = [(e.self_cpu_time_total / total, e.key, e.count) for e in profiler.key_averages()]
    products = sum(share for share, name, _ in found if any(word in name for word in PRODUCTS))
    outside = max(0.0, 1 - sum(share for share, _, _ in found))
    slowest = sorted(found, reverse=True)[:N_OPERATORS]
    return [
        f"  {products:4.0%} all matrix products and convolutions",
        f"  {outside:4.0%} outside torch",
        *(f"  {share:4.0%} {name} ({count} calls)" for share, name, count in slowest),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a list for each path and length, on a CPU."""
    args = lab.parser(__doc__, "precision", "seconds").parse_args(argv)
    with lab.folders(args.models) as found:
        systems = lab.load_all(found, args.precision)
    for (model, path), system in systems.items():
        for seconds in args.seconds:
            print(f"{model}, {path}, {seconds:g} s", *profile(system, seconds), sep="\n")


if __name__ == "__main__":
    lab.run(main)
