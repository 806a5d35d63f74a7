"""The commands and the Python of README, docs/, recipes/ and pretrained/, as a reader finds them.

An indented line is a command, and so is a line of a fence `sh`; formulas are told by their sign.
Other fences hold what they are called: `python` or `text`. Between backticks a command is what
begins with a program and is more than a name.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted((ROOT / "pretrained").rglob("*.md")),
]
_FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}|\t)(.*)$", re.MULTILINE)
_FORMULA = re.compile(r"[\w ()|'/,]+ (=|<-) ")
_COMMAND = re.compile(r"(waveflow \S+|python|pip|pytest|torchrun|git|ray|npm|mkdocs|ruff|mypy) \S")


class Fence(NamedTuple):
    """A fenced block: what it says it holds, and its text."""

    kind: str
    text: str


def identity(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


def fences(page: str) -> list[Fence]:
    """The fenced blocks of a page's text."""
    return [Fence(*match.groups()) for match in _FENCE.finditer(page)]


def code_blocks(page: str) -> list[str]:
    """The Python of a page's text."""
    return [fence.text for fence in fences(page) if fence.kind == "python"]


def shown(page: str) -> list[str]:
    """Indented lines and those of fences `sh`, whole and without their comments."""
    text = "".join(fence.text for fence in fences(page) if fence.kind == "sh")
    lines = [*text.split("\n"), *_INDENTED.findall(_FENCE.sub("", page))]
    whole = "\n".join(lines).replace("\\\n", " ").split("\n")
    return [" ".join(re.sub(r"(^|\s)# .*", "", line).split()) for line in whole]


def inline(page: str) -> list[str]:
    """What stands between backticks in the prose."""
    prose = _INDENTED.sub("", _FENCE.sub("", page))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(page: str) -> Iterator[str]:
    """The commands of a page's text, one by one."""
    lines = [line for line in shown(page) if not _FORMULA.match(line)]
    lines += [code for code in inline(page) if _COMMAND.match(code)]
    for line in lines:
        yield from filter(None, line.split(" && "))


def all_commands() -> list[str]:
    """The commands of all pages, each once."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return list(dict.fromkeys(line for text in texts for line in commands(text)))
