"""Every command of README, docs/, recipes/ and pretrained/ runs as it stands, or is listed here.

Each runs in a folder that has what the pages name: recordings, mels, corpora, small recipes in
place of the real ones, a run, a converted WaveGlow. tests/stand_ins has programs and packages that
no test needs. SMALLER has what is run in place of large numbers and GPUs, LISTED what is not run.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_voice
from pages import ROOT, all_commands, commands
from safetensors.torch import load_file
from small_voice import N_MELS, TINY, tiny_model_of
from test_convert import upsample_weight

from sizes import SIZES
from waveflow.audio.mel import MEL_PRESETS
from waveflow.cli.main import main
from waveflow.tts.voice import VoiceCard, save_voice

RATE = 22050
PUBLISHED = ROOT / "tests" / "fixtures" / "nvidia-waveglow-80mel"
STAND_INS = ROOT / "tests" / "stand_ins"
WAVEGLOW = {
    "n_mel_channels": 80,
    "n_flows": 3,
    "n_group": 8,
    "n_early_every": 2,
    "n_early_size": 2,
    "WN_config": {"n_layers": 2, "n_channels": 6, "kernel_size": 3},
}
# A pattern of commands, and why they are not run.
LISTED = {
    "^pip ": "needs the network; .ci/run installs the package, its extras and torch",
    "^git clone$": "needs the network",
    "--download": "needs the network",
    "microsoft/": "needs the network; tests/test_tts.py makes such a model",
    "docs/demo/build.py": "needs the network; tests/test_demo.py builds the page in .ci/run",
    "^(sbatch|kubectl|ray job)": "needs a cluster; tests/test_cluster.py runs and reads both files",
    "^curl ": "needs a server; tests/test_serve.py runs these lines",
    "^pytest( tests/.*)?$": "is in .ci/run",
    r"^pytest -m slow tests/test_(demo|tutorial)\.py$": "is in .ci/run",
    r"^pytest -m slow( tests/test_(survival|windows)\.py)?$": "takes up to an hour",
    r"^(\.ci/run|ruff .*|mypy)$": "is .ci/run, or in it",
    "^mkdocs serve$": "goes on until it is stopped; .ci/run builds the site",
    "recipes/smoke/run.py": "is in .ci/run",
    "(07_speech|08_build_your_own.py)$": "takes minutes; tests/test_tutorial.py runs it in .ci/run",
    "^waveflow export ": "takes a minute; a small model is exported, by `checkpoints` below",
    "compare nice realnvp": "takes hours; a shorter one is run",
    "COMMAND": "stands for every command; tests/test_cli.py has the help of each",
}
# A pattern within commands, and what is run in its place.
SMALLER = {
    # No GPU, two processes, one machine.
    "--device cuda": "--device cpu",
    "--gpus 1": "--gpus 0",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nnodes 4 (.*)HOST:29500": r"--nnodes 1 \1localhost:0",
    # Any free port, for this machine alone.
    "^(waveflow serve)$": r"\1 --port 0",
    "--host 0.0.0.0 --port 8080": "--port 0",
    "-m http.server": r"\g<0> 0 --bind 127.0.0.1",
    "^tensorboard ": r"\g<0>--port 0 ",
    # Compilers take minutes.
    " --compile": "",
    "^waveflow bench$": r"\g<0> --seconds 0.1 --runs 1",
    "compare nice glow( wavenet)? --minutes 1": "compare nice --minutes 0.01",
    "frameglow-cc0 waveglow-256": "frameglow-cc0 --no-peers",
    "frameglow-cc0 waveglow-64": "frameglow-cc0",
    "squeezewave-128-256 .*(squeezewave-256-128)": r"\1",
    "(benchmarks/.*) --seconds( [14])+": r"\1 --seconds 0.1",
    "memory.py(.*) float32 bfloat16 int8": r"memory.py\1 float32",
    "(speed|against).py.*": r"\g<0> --runs 1",
    "training.py waveglow-64": r"\g<0> --seconds 0.1 --runs 1",
    "--base da072d2": "--base HEAD",
    "--clients 16 --minutes 3": "--clients 2 --minutes 0.05",
    "--cases 20000": "--cases 4",
    "--kills 200 --disks 60 --pairs 40": "--kills 1 --disks 1 --pairs 1",
    "survival.py --kills 200": "survival.py --kills 1",
    "--lengths 2000": "--lengths 20 --model runs/x",
    "tts/train.py (.*?)( --minutes 120)?$": r"tts/train.py \1 --minutes 0.01",
    # The folder of my_flow.py, and a cache.
    "PYTHONPATH=FOLDER(.*) --data data": r"PYTHONPATH=docs/tutorial\1 --data data/lj",
}
# These go on until they are stopped, and print their address when they are ready.
SERVERS = re.compile("^waveflow serve|http.server|^tensorboard")
PROGRAMS = {"waveflow", "python", "torchrun", "cat", "tensorboard"}
SMALL = (ROOT / "tests" / "small_recipe.toml").read_text().replace("steps = 60", "steps = 2")


def reasons(line: str) -> list[str]:
    """Why a command is not run; nothing where it is."""
    return [reason for part, reason in LISTED.items() if re.search(part, line)]


def program(line: str) -> str:
    """The program of a command, without the variables that are set for it."""
    return re.sub(r"^([A-Z_]+=\S* )+", "", line).split()[0]


def smaller(line: str) -> str:
    for part, instead in SMALLER.items():
        line = re.sub(part, instead, line)
    return line


# What is run, and the command that it stands for.
RUN = {smaller(line): line for line in all_commands() if not reasons(line)}


def corpus(folder: Path, seconds: float = 1.2) -> None:
    (folder / "wavs").mkdir(parents=True)
    names = [f"clip{i}" for i in range(4)]
    for i, name in enumerate(names):
        soundfile.write(folder / "wavs" / f"{name}.wav", make_voice(seconds, i), RATE)
    (folder / "metadata.csv").write_text("".join(f"{name}|words|words\n" for name in names))
    (folder / "val.txt").write_text("clip3\n")


def recipes() -> None:
    """Those of the repository, the ones that pages train made small."""
    shutil.copytree(ROOT / "recipes", "recipes")
    for name in (
        "ljspeech/frameglow",
        "ljspeech/frameglow-small",
        "ljspeech/waveglow",
        "zoo/frameglow",
    ):
        Path(f"recipes/{name}.toml").write_text(SMALL)
    Path("RECIPE").write_text(SMALL)
    tuning = Path("recipes/ljspeech/fine-tune.toml").read_text()
    for name, value in (("batch_size", 2), ("segment_frames", 32)):
        tuning, n = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", tuning)
        assert n == 1, name
    tuning = tuning.replace("[train]", "[train]\nsteps = 1")
    Path("recipes/ljspeech/fine-tune.toml").write_text(tuning)
    page = Path("docs/tutorial/08_build_your_own.md").read_text()
    [recipe] = re.findall(r'^RECIPE = """(.*?)"""', page, re.MULTILINE | re.DOTALL)
    Path("recipe.toml").write_text(re.sub(r"= 40\b", "= 2", recipe))


def checkpoints() -> None:
    """Published WaveGlows, one of them converted, runs, and a voice."""
    weights = load_file(PUBLISHED / "state_dict.safetensors")
    with np.load(PUBLISHED / "reference.npz", allow_pickle=False) as arrays:
        weights["upsample.weight"] = upsample_weight(arrays)
    published = {"state_dict": weights, "config": WAVEGLOW}
    for name in ("waveglow_256channels.pt", "waveglow_256channels_universal_v5.pt"):
        torch.save(published, name)
    assert main(["convert", "waveglow_256channels.pt", "-o", "models/waveglow"]) == 0
    for name in ("lj", "cc0", "tuned"):
        assert main(["prepare", "CORPUS", "-o", f"data/{name}", "--workers", "1"]) == 0
    for name in ("x", "cc0"):
        assert main(["train", "RECIPE", "--data", "data/lj", "--out", f"runs/{name}"]) == 0
    small = ["--weights", "int8", "--refine", "0"]
    assert main(["export", "runs/x", "-o", "frameglow.onnx", *small]) == 0
    card = VoiceCard(model=TINY, mel=MEL_PRESETS["hifigan"])
    Path("runs/voice").mkdir()
    save_voice(Path("runs/voice/voice"), card, tiny_model_of(N_MELS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("benchmarks", "tests", "waveflow", ".git"):
            Path(name).symlink_to(ROOT / name)
        # Some commands write into these.
        shutil.copytree(ROOT / "pretrained", "pretrained")
        shutil.copytree(ROOT / "docs" / "tutorial", "docs/tutorial")
        soundfile.write("in.wav", make_voice(1.0), RATE)
        soundfile.write("hum.wav", 0.01 * np.random.default_rng(0).standard_normal(RATE), RATE)
        Path("mels").mkdir()
        # Speech: of other sounds no convention is told.
        for name in ("mel.npy", "mels/a.npy", "mels/b.npy"):
            shutil.copy("pretrained/frameglow-cc0/example.npy", name)
        for name in ("LJSpeech-1.1", "CORPUS", "NEW_VOICE", "RECORDINGS", "kathleen", "flemishguy",
                     "kerstin", "nathalie", "PATH/TO/LJSpeech-1.1"):  # fmt: skip
            corpus(Path(name))
        soundfile.write("kathleen/wavs/arctic_a0115_1592745922.flac", make_voice(1.2), RATE)
        with tarfile.open("PATH/TO/LJSpeech-1.1.tar.bz2", "w:bz2") as archive:
            archive.add("PATH/TO/LJSpeech-1.1", "LJSpeech-1.1")
        for name in ("FOLDER", "PATH/TO/wavs"):
            shutil.copytree("CORPUS/wavs", name)
        Path("FOLDER_OF_WAVS").mkdir()
        shutil.copy("CORPUS/wavs/clip0.wav", "FOLDER_OF_WAVS")
        assert main(["mel", "CORPUS/wavs", "-o", "FOLDER"]) == 0
        Path("val.txt").write_text("clip3\n")
        Path("book.txt").write_text("Chapter one.\n\nIt was a dark night,\nand cold.\n")
        Path("site").mkdir()
        recipes()
        checkpoints()
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the world to work in, with the stand-ins in reach."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{STAND_INS}:{Path(sys.executable).parent}", prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{STAND_INS}")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # CI has other work for the cores
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN)
def test_a_command_of_the_pages_runs(here: Path, line: str) -> None:
    if "against.py" in line and not (ROOT / ".git").exists():
        pytest.skip("the history is not here")
    words = shlex.split(line)
    outs = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("-o", "--out")]
    outs = [out for out in outs if out != Path("-")]
    for out in outs:
        if "--resume" not in words:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    if SERVERS.search(line):
        serves(line)
    elif words[0] == "waveflow":  # in this process, which has imported everything
        assert main(words[1:]) == 0
    else:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert all(out.exists() for out in outs)


def serves(line: str) -> None:
    """Starts a server, waits for its address and ends it."""
    with subprocess.Popen(
        f"exec {line}", shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for text in process.stdout:
            said.append(text)
            if "http://" in text:
                process.send_signal(signal.SIGTERM)
                return
    raise AssertionError("".join(said))


# --- nothing slips through ---


def test_every_command_is_run_or_listed() -> None:
    lines = all_commands()
    assert len(RUN) > 80
    strange = [line for line in RUN if program(line) not in PROGRAMS]
    assert not strange, "neither run nor listed"
    assert all(len(reasons(line)) < 2 for line in lines)
    unused = [part for part in LISTED if not any(re.search(part, line) for line in lines)]
    own = [line for line in lines if not reasons(line)]
    unused += [part for part in SMALLER if not any(re.search(part, line) for line in own)]
    assert not unused, "matches no command"


def test_files_and_extras_that_commands_name_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for line in all_commands():
        for name in re.findall(r"(?<!\S)(?:benchmarks|docs|recipes|tests|pretrained)/\S+", line):
            assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), line
        for name in re.findall(r"(?:waveglow|squeezewave)-\d\S*", line):
            assert name in SIZES, line
        for names in re.findall(r"(?:\.|waveflow)\[(.*?)\]", line):
            assert set(names.split(",")) <= extras, line


class Parsed(Exception):
    """A script has taken its options."""


def scripts() -> list[str]:
    """The commands that start a script with options, in their own large numbers."""
    lines = [line for line in all_commands() if line.startswith("python ")]
    named = [line for line in lines if (ROOT / line.split()[1]).is_file()]
    return [line for line in named if "parse_args" in (ROOT / line.split()[1]).read_text("utf-8")]


@pytest.mark.parametrize("line", scripts())
def test_a_script_takes_the_options_of_the_page(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, args: Sequence[str] | None = None) -> None:
        parse_args(self, args)
        raise Parsed

    script, *options = shlex.split(line)[1:]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [script, *options])
    for name in ("ray", "ray.data"):  # which one script imports first of all
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.syspath_prepend((ROOT / script).parent)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_what_ci_is_said_to_run_is_there() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for line in all_commands():
        for reason in reasons(line):
            for name in re.findall(r"tests/test_\w+\.py", reason):
                assert (ROOT / name).is_file(), reason
                assert ".ci/run" not in reason or name in ci, reason
        if reasons(line) == ["is in .ci/run"] and not line.startswith("pytest tests"):
            assert all(word in ci for word in line.split()), line


def test_what_counts_as_a_command() -> None:
    page = """
    docker run x \\
        --y    # why
    z <- f(x)

```sh
cd there && ls
```

```text
no command
```

`waveflow info`, `waveflow/cli/`, `pip
install it` and `code`.
"""
    expected = ["cd there", "ls", "docker run x --y", "pip install it"]
    assert list(commands(page)) == expected
