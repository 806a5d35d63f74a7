"""Every `waveflow` command line of README, docs/ and recipes/ runs as it stands.

Each runs in a folder that has what the pages name: recordings, mels, corpora, small recipes in
place of the real ones, a run, a converted WaveGlow. What is not run is listed with its reason.
"""

import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_voice
from safetensors.torch import load_file
from small_voice import N_MELS, TINY, tiny_model_of
from test_convert import upsample_weight
from test_docs import PAGES

from waveflow.audio.mel import MEL_PRESETS
from waveflow.cli.main import main
from waveflow.tts.voice import VoiceCard, save_voice

ROOT = Path(__file__).parent.parent
RATE = 22050
PUBLISHED = ROOT / "tests" / "fixtures" / "nvidia-waveglow-80mel"
WAVEGLOW = {
    "n_mel_channels": 80,
    "n_flows": 3,
    "n_group": 8,
    "n_early_every": 2,
    "n_early_size": 2,
    "WN_config": {"n_layers": 2, "n_channels": 6, "kernel_size": 3},
}
# A part of the command, and why it is not run.
NOT_RUN = {
    "--download": "fetches a corpus",
    "cuda": "needs a GPU",
    "aplay": "plays aloud",
    "compare": "takes the minutes that it names; tests/test_compare.py runs it",
    "bench": "measures for a minute; tests/test_bench.py runs it",
    "export": "takes a minute; tests/test_export.py runs it",
    "waveflow serve": "goes on until it is stopped; tests/test_serve.py runs it",
    "espeak": "needs the program espeak-ng; tests/test_tts.py runs a stand-in",
    "microsoft/": "fetches a model; tests/test_tts.py makes one",
    "--backend": "needs an exported graph; tests/test_export.py runs it",
}
SMALL = (ROOT / "tests" / "small_recipe.toml").read_text().replace("steps = 60", "steps = 2")


def command_lines() -> list[str]:
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for line in re.findall(r"^ {4}(.*)$", text, re.MULTILINE):
            line = " ".join(re.sub(r"\s# .*", "", line).split())
            if re.search(r"(^|&& |\| )waveflow [a-z-]+( |$)", line) or "-m waveflow" in line:
                found[line] = None
    return list(found)


def corpus(folder: Path, seconds: float = 1.2) -> None:
    (folder / "wavs").mkdir(parents=True)
    names = [f"clip{i}" for i in range(4)]
    for i, name in enumerate(names):
        soundfile.write(folder / "wavs" / f"{name}.wav", make_voice(seconds, i), RATE)
    (folder / "metadata.csv").write_text("".join(f"{name}|words|words\n" for name in names))
    (folder / "val.txt").write_text("clip3\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        soundfile.write("in.wav", make_voice(1.0), RATE)
        soundfile.write("hum.wav", 0.01 * np.random.default_rng(0).standard_normal(RATE), RATE)
        Path("mels").mkdir()
        # Speech: of other sounds no convention is told.
        for name in ("mel.npy", "mels/a.npy", "mels/b.npy"):
            shutil.copy(ROOT / "pretrained/frameglow-cc0/example.npy", name)
        for name in ("LJSpeech-1.1", "CORPUS", "NEW_VOICE", "kathleen", "flemishguy", "kerstin",
                     "nathalie", "PATH/TO/LJSpeech-1.1"):  # fmt: skip
            corpus(Path(name))
        with tarfile.open("PATH/TO/LJSpeech-1.1.tar.bz2", "w:bz2") as archive:
            archive.add("PATH/TO/LJSpeech-1.1", "LJSpeech-1.1")
        for name in ("FOLDER_OF_WAVS", "PATH/TO/wavs"):
            shutil.copytree("CORPUS/wavs", name)
        Path("val.txt").write_text("clip3\n")
        Path("book.txt").write_text("Chapter one.\n\nIt was a dark night,\nand cold.\n")
        card = VoiceCard(model=TINY, mel=MEL_PRESETS["hifigan"])
        Path("runs/voice").mkdir(parents=True)
        save_voice(Path("runs/voice/voice"), card, tiny_model_of(N_MELS))
        assert main(["mel", "CORPUS/wavs", "-o", "FOLDER"]) == 0
        Path("recipes/ljspeech").mkdir(parents=True)
        for name in ("frameglow", "waveglow"):
            Path(f"recipes/ljspeech/{name}.toml").write_text(SMALL)
        tuning = (ROOT / "recipes/ljspeech/fine-tune.toml").read_text()
        for name, value in (("batch_size", 2), ("segment_frames", 32)):
            tuning, n = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", tuning)
            assert n == 1, name
        tuning = tuning.replace("[train]", "[train]\nsteps = 1")
        Path("recipes/ljspeech/fine-tune.toml").write_text(tuning)
        small = "recipes/ljspeech/frameglow.toml"
        for name in ("lj", "cc0", "tuned"):
            assert main(["prepare", "CORPUS", "-o", f"data/{name}", "--workers", "1"]) == 0
        for name in ("x", "cc0"):
            assert main(["train", small, "--data", "data/lj", "--out", f"runs/{name}"]) == 0
        weights = load_file(PUBLISHED / "state_dict.safetensors")
        with np.load(PUBLISHED / "reference.npz", allow_pickle=False) as arrays:
            weights["upsample.weight"] = upsample_weight(arrays)
        published = {"state_dict": weights, "config": WAVEGLOW}
        for name in ("waveglow_256channels.pt", "waveglow_256channels_universal_v5.pt"):
            torch.save(published, name)
        assert main(["convert", "waveglow_256channels.pt", "-o", "models/waveglow"]) == 0
    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", command_lines())
def test_a_command_of_the_pages_runs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    for part, reason in NOT_RUN.items():
        if part in line:
            pytest.skip(reason)
    here = tmp_path / "here"
    shutil.copytree(world, here, symlinks=True)
    monkeypatch.chdir(here)
    words = shlex.split(line[line.index("waveflow ") :])[1:]
    if line.startswith("cat "):
        monkeypatch.setattr(sys, "stdin", open(shlex.split(line)[1]))  # noqa: SIM115
    for option in ("-o", "--out"):
        if option in words and "--resume" not in words:
            out = Path(words[words.index(option) + 1])
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    assert main(words) == 0
    for option in ("-o", "--out"):
        if option in words:
            assert Path(words[words.index(option) + 1]).exists()


def test_pages_have_command_lines() -> None:
    """Else a pattern that finds nothing would pass above; and each reason has a command."""
    lines = command_lines()
    assert len(lines) > 30
    assert all(any(part in line for line in lines) for part in NOT_RUN)
