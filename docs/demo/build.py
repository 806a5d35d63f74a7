"""Builds the page: its graphs from the model that ships, and onnxruntime-web from npm.

    python docs/demo/build.py site
    python -m http.server --directory site

The folder then needs no network and no server of ours. Needs the extra `onnx`, and npm.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import waveflow
from waveflow.audio.io import write_audio
from waveflow.export.onnx import export, export_listener

HERE = Path(__file__).parent
# The picture of samples is the server's, too.
SPECTROGRAM = Path(waveflow.__file__).parent / "serve" / "spectrogram.js"
PAGE = (HERE / "index.html", HERE / "demo.css", HERE / "demo.js", SPECTROGRAM)
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)


def add_runtime(folder: Path) -> None:
    """Puts onnxruntime-web into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = ["npm", "pack", RUNTIME, "--silent"]
        name = subprocess.run(
            command, cwd=work, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        with tarfile.open(Path(work) / name.split()[-1]) as archive:
            for file in (*RUNTIME_FILES, "LICENSE"):
                inner = file if file == "LICENSE" else f"dist/{file}"
                try:
                    data = archive.extractfile(f"package/{inner}")
                except KeyError:
                    if file != "LICENSE":  # which may stand in package.json alone
                        raise
                    continue
                assert data is not None
                (folder / file).write_bytes(data.read())


def add_models(folder: Path) -> None:
    """Exports the model that ships, both ways, and an example: a draw of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    vocoder = waveflow.load()
    export(vocoder, folder / "speak.onnx", ("sigma", "noise"), weights="float16")
    export_listener(vocoder, folder / "listen.onnx", "float16")
    example = vocoder.example_mel()
    assert example is not None
    write_audio(folder / "example.wav", vocoder(example).numpy(), vocoder.sample_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder that is made")
    args = parser.parse_args()
    if shutil.which("npm") is None:
        sys.exit("build.py needs npm, which fetches onnxruntime-web")
    args.out.mkdir(parents=True, exist_ok=True)
    for path in PAGE:
        shutil.copy(path, args.out)
    add_runtime(args.out / "ort")
    add_models(args.out / "models")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
