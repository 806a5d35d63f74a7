"""The tutorial: its scripts run, and its pages say what the scripts say and print."""

import os
import re
from pathlib import Path

import pytest
import torch

import build_pages
from build_pages import HERE, read_cells, scripts, source_of, without_results

SCRIPTS = {script.stem: script for script in scripts()}
# Trainings, and the model that ships.
SLOW = {"03_two_moons", "07_speech", "08_build_your_own"}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
# Words read in a minute.
PROSE, CODE = 200, 400


def page_of(script: Path) -> str:
    return script.with_suffix(".md").read_text(encoding="utf-8")


def numbers(page: str) -> list[float]:
    """All numbers of a page but the minutes that something took."""
    return [float(number) for number in NUMBER.findall(re.sub(r"[\d.]+ minutes", "", page))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_says_what_its_script_says(name: str) -> None:
    """Else somebody changed one of them: python docs/tutorial/build_pages.py"""
    said = "".join(source_of(cell) for cell in read_cells(SCRIPTS[name]))
    assert without_results(page_of(SCRIPTS[name])) == said.rstrip("\n") + "\n"


def test_pages_are_short_listed_and_have_small_pictures() -> None:
    index = (HERE / "README.md").read_text(encoding="utf-8")
    pages = {name: page_of(script) for name, script in SCRIPTS.items()}
    assert len(pages) == 8
    for name, page in pages.items():
        assert f"]({name}.md)" in index
        words = {"prose": 0, "code": 0}
        for cell in read_cells(SCRIPTS[name]):
            words["prose" if cell.kind == "markdown" else "code"] += len(cell.text.split())
        assert words["prose"] / PROSE + words["code"] / CODE < 10, words
        assert "**The question: " in page and "## In one sentence" in page
    shown = {name for page in pages.values() for name in re.findall(r"\(([^)]*\.png)\)", page)}
    sizes = {path.name: path.stat().st_size for path in HERE.glob("*.png")}
    assert shown == set(sizes)
    assert max(sizes.values()) < 60_000 and sum(sizes.values()) < 1_000_000


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SCRIPTS]
)
def test_a_script_prints_what_its_page_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    folder = Path(os.environ.get("WAVEFLOW_RECORDINGS", "data/kathleen")).absolute()
    if name == "07_speech" and not (folder / "val.txt").is_file():
        pytest.skip(f"no recordings in {folder}: WAVEFLOW_RECORDINGS names their folder")
    monkeypatch.setenv("WAVEFLOW_RECORDINGS", str(folder))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(), torch.enable_grad():
        page = build_pages.run(SCRIPTS[name])
    committed = page_of(SCRIPTS[name])
    assert NUMBER.sub("#", page.text) == NUMBER.sub("#", committed)
    # Other processors round otherwise, and trainings make that larger.
    tolerance = 0.2 if name in SLOW else 0.02
    expected = pytest.approx(numbers(committed), rel=tolerance, abs=tolerance)
    assert numbers(page.text) == expected
    assert all(data.startswith(b"\x89PNG") for data in page.pictures.values())
