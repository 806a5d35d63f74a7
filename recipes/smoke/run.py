"""A recipe from recordings to speech, on made-up clips and with tiny models.

    python recipes/smoke/run.py

For each recipe beside this file: prepare, train, resume, evaluate and synthesise, with the commands
that a user types. It takes half a minute on one core. It ends with status 1 at the first command
that fails or the first output that is missing, silent or too short.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from waveflow.checkpoint import read_files, resolve_run
from waveflow.cli.main import main as waveflow
from waveflow.training.config import read_recipe

RATE, SECONDS, N_CLIPS = 22050, 1.0, 6
VALIDATION = ["clip4", "clip5"]


def main() -> None:
    """Runs every smoke recipe, each in a temporary folder."""
    for recipe in sorted(Path(__file__).parent.glob("*.toml")):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            run_recipe(recipe, Path(scratch))
        print(f"{recipe.name}: whole, {time.monotonic() - begin:.0f} s")


def run_recipe(recipe: Path, scratch: Path) -> None:
    """Runs all stages of one recipe, with a check after each."""
    settings = read_recipe(recipe)
    corpus, cache, run = scratch / "corpus", scratch / "cache", scratch / "run"
    make_corpus(corpus)

    command("prepare", corpus, "-o", cache, "--mel", recipe, "--workers", 1)
    kept = json.loads((cache / "manifest.json").read_text())["clips"]
    expect(len(kept) == N_CLIPS, f"{cache} has {len(kept)} of {N_CLIPS} clips")

    training = ("train", recipe, "--data", cache, "--out", run)
    command(*training, "--max-minutes", 0)  # one step: a run that is cut short
    expect_step(run, 1)
    command(*training, "--resume")
    expect_step(run, settings.train.steps)
    for name in ("recipe.json", "run.json", "metrics.csv"):
        expect((run / name).stat().st_size > 0, f"{run / name} is empty")
    expect("validation" in (run / "metrics.csv").read_text(), f"{run} was never validated")

    wavs, ids, figures = corpus / "wavs", scratch / "ids.txt", scratch / "figures.json"
    ids.write_text(VALIDATION[0])  # one clip: the judges of its copies take most of the time
    selection = ("--ids", ids, "--json", figures, "--threads", 1)
    command("evaluate", wavs, "--model", run, *selection)
    result = json.loads(figures.read_text())
    expect(result["n_clips"] == 1, f"{result['n_clips']} clips were evaluated instead of 1")
    expect(math.isfinite(result["log_prob_speech"]), "the likelihood is not finite")

    command("mel", wavs, "-o", scratch / "mels", "--model", run)
    command("vocode", scratch / "mels", "-o", scratch / "spoken", "--model", run, "--threads", 1)
    command("resynth", wavs, "-o", scratch / "copies", "--model", run, "--threads", 1)
    for folder in (scratch / "spoken", scratch / "copies"):
        expect_speech(folder, settings.mel.sample_rate, settings.mel.hop_length)


def make_corpus(folder: Path) -> None:
    """Writes clips in LJSpeech's layout: harmonics of a gliding pitch, in noise."""
    (folder / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    seconds = np.arange(round(RATE * SECONDS)) / RATE
    names = [f"clip{number}" for number in range(N_CLIPS)]
    for number, name in enumerate(names):
        phase = 2 * np.pi * (100 + 20 * number + 40 * seconds) * seconds
        tone = sum(np.sin(k * phase) / k for k in range(1, 20))
        noise = rng.standard_normal(len(seconds))
        loudness = np.sin(np.pi * seconds / SECONDS) ** 2
        audio = 0.15 * loudness * tone + 0.003 * noise
        soundfile.write(folder / "wavs" / f"{name}.wav", audio, RATE)
    (folder / "metadata.csv").write_text("".join(f"{name}|made up\n" for name in names))
    (folder / "val.txt").write_text("\n".join(VALIDATION) + "\n")


def command(*arguments: object) -> None:
    """Runs `waveflow` with these arguments, in this process: torch is imported once."""
    words = [str(argument) for argument in arguments]
    print("$ waveflow", *words, flush=True)
    expect(waveflow(words) == 0, f"waveflow {words[0]} failed")


def expect(holds: bool, otherwise: str) -> None:
    """Ends the script with status 1 and one line if something does not hold."""
    if not holds:
        sys.exit(f"smoke: {otherwise}")


def expect_step(run: Path, step: int) -> None:
    """Expects that the newest checkpoint is that of a step, and whole."""
    newest = resolve_run(run, "last")
    expect(newest.name == f"step-{step:08d}", f"{newest} is not of step {step}")
    read_files(newest)


def expect_speech(folder: Path, sample_rate: int, hop_length: int) -> None:
    """Expects one file for each clip, at the model's rate, of the clip's length and not silent."""
    files = sorted(folder.glob("*.wav"))
    expect(len(files) == N_CLIPS, f"{folder} has {len(files)} of {N_CLIPS} files")
    for file in files:
        audio, rate = soundfile.read(file)
        expect(rate == sample_rate, f"{file} has {rate} Hz")
        missing = round(SECONDS * rate) - len(audio)
        # A mel has only whole frames.
        expect(0 <= missing < hop_length, f"{file} lacks {missing} samples")
        expect(bool(audio.std() > 1e-4), f"{file} is silent")


if __name__ == "__main__":
    main()
