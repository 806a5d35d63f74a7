"""README, docs/ and recipes/: verbs and options exist, links lead somewhere, fences are named.

test_commands.py runs the commands, test_blocks.py the Python.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from pages import PAGES, fences, identity, inline, shown

from waveflow.cli.main import app

VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def mentions(page: Path) -> Iterator[list[str]]:
    """The words of each `waveflow` command, also of those without their files."""
    text = page.read_text(encoding="utf-8")
    for line in (*shown(text), *inline(text)):
        for part in re.split(r"&&|\|", line):
            if match := re.match(r" *(?:torchrun .* -m )?waveflow ([a-z].*)", part):
                yield shlex.split(match[1])


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_commands_have_these_verbs_and_options(page: Path) -> None:
    for verb, *words in mentions(page):
        assert verb in VERBS, f"waveflow {verb}"
        known = {name for param in VERBS[verb].params for name in param.opts}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known | {"--help", "-h"}, f"waveflow {verb}: {given - known}"


def test_pages_have_commands() -> None:
    """Else a pattern that finds nothing would pass above."""
    verbs = {words[0] for page in PAGES for words in mentions(page)}
    assert verbs == set(VERBS)


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_a_fence_says_what_it_holds(page: Path) -> None:
    """By that the tests know what to run."""
    text = page.read_text(encoding="utf-8")
    assert {fence.kind for fence in fences(text)} <= {"python", "sh", "text"}
    assert 2 * len(fences(text)) == len(re.findall(r"```|~~~", text))
