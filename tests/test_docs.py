"""README, docs/ and recipes/: their commands exist, their code runs, their links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer.main
from conftest import make_voice

import waveflow
from waveflow.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted((ROOT / "pretrained").rglob("*.md")),
]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `waveflow` command in the indented lines and between backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    shown = re.findall(r"^ {4}(.*)$", text, re.MULTILINE) + re.findall(r"`([^`]+)`", text)
    for line in shown:
        for part in re.split(r"&&|\|", re.sub(r"\s# .*", "", " ".join(line.split()))):
            if match := re.match(r" *(?:torchrun .* -m )?waveflow ([a-z].*)", part):
                yield shlex.split(match[1])


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_commands_have_these_verbs_and_options(page: Path) -> None:
    for verb, *words in commands(page):
        assert verb in VERBS, f"waveflow {verb}"
        known = {name for param in VERBS[verb].params for name in param.opts}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known | {"--help", "-h"}, f"waveflow {verb}: {given - known}"


def test_pages_have_commands() -> None:
    """Else a pattern that finds nothing would pass above."""
    verbs = {words[0] for page in PAGES for words in commands(page)}
    assert verbs == set(VERBS)


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_code_of_readme_and_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("in.wav", make_voice(1.0), 22050)
    vocoder = waveflow.load()
    mel = vocoder.mel(torch.from_numpy(make_voice(0.5)))
    names = {
        "audio": torch.from_numpy(make_voice(0.5)),
        "mel": mel,
        "mels": torch.stack([mel, mel]),
        "frames": torch.tensor([mel.shape[1], 20]),
        "mel_pieces": mel.split(10, dim=1),
        "play": lambda piece: None,
    }
    blocks = [
        block
        for page in ("README.md", "docs/index.md", "docs/using.md", "docs/flows.md", "docs/say.md")
        for block in code_blocks(ROOT / page)
        if 'device="cuda"' not in block and "org/name" not in block
    ]
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names | {"__name__": "block"})
    wav, _ = soundfile.read("out.wav")
    assert np.isfinite(wav).all() and 22050 - 256 <= len(wav) <= 22050 + 256
