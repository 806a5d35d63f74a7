"""Builds the pages of the tutorial: NN_name.md and its pictures from the script NN_name.py.

    python docs/tutorial/build_pages.py [NN_name...]

Needs `pip install -e '.[dev]'`. Scripts are in the percent format, which editors run cell by cell:
`# %% [markdown]` begins prose in comments, `# %% [file] NAME` shows a file beside the script, and
`# %%` begins code. Under the code comes what it printed, then its figures; a figure's label is its
description. The test suite fails where a page and its script differ.
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
# What running a script adds to its page.
_ADDED = re.compile(r"```text\n.*?```\n\n|!\[[^\]]*\]\([^)]*\.png\)\n\n", re.DOTALL)


class Cell(NamedTuple):
    """A part of a script: its kind ("markdown", "file" or ""), its text and its first line."""

    kind: str
    text: str
    line: int


class Page(NamedTuple):
    """A page, and the bytes of its pictures by name."""

    text: str
    pictures: dict[str, bytes]


def scripts() -> list[Path]:
    """The pages' scripts, in their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read_cells(script: Path) -> Iterator[Cell]:
    """The cells of a script."""
    source = script.read_text(encoding="utf-8")
    marks = [*_CELL.finditer(source)]
    for mark, end in zip(marks, [m.start() for m in marks[1:]] + [len(source)], strict=True):
        kind, _, name = mark[1].strip().partition("] ")
        kind = kind.strip("[]")
        text = source[mark.end() : end].strip("\n")
        if kind == "file":
            text = (HERE / name).read_text(encoding="utf-8").strip("\n")
        yield Cell(kind, text, source.count("\n", 0, mark.end()))


def source_of(cell: Cell) -> str:
    """A cell as Markdown, without what it prints."""
    if cell.kind == "markdown":
        return re.sub(r"^# ?", "", cell.text, flags=re.MULTILINE) + "\n\n"
    return f"```python\n{cell.text}\n```\n\n"


def run(script: Path) -> Page:
    """Runs a script and makes its page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    parts, pictures = [], {}
    for cell in read_cells(script):
        parts.append(source_of(cell))
        if cell.kind:
            continue
        printed = io.StringIO()
        # Empty lines before it, so that an error names the script's line.
        code = compile("\n" * cell.line + cell.text, str(script), "exec")
        with redirect_stdout(printed):
            exec(code, names)
        if printed.getvalue():
            parts.append(f"```text\n{printed.getvalue().rstrip()}\n```\n\n")
        for number in plt.get_fignums():
            name = f"{script.name[:2]}-{len(pictures) + 1}.png"
            pictures[name] = picture(plt.figure(number))
            parts.append(f"![{plt.figure(number).get_label()}]({name})\n\n")
        plt.close("all")
    return Page("".join(parts).rstrip("\n") + "\n", pictures)


def picture(figure: Any) -> bytes:
    """A figure as PNG of 32 colours: a third of the size, and next to no difference."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=80)
    Image.open(drawn).convert("RGB").quantize(32).save(small, "PNG", optimize=True)
    return small.getvalue()


def without_results(page: str) -> str:
    """A page's prose and code: what its script says without running."""
    return _ADDED.sub("", page + "\n").rstrip("\n") + "\n"


def main() -> None:
    """Builds the pages named on the command line, or all."""
    sys.path.insert(0, str(HERE))  # for the files that scripts import
    for script in scripts():
        if sys.argv[1:] and script.stem not in sys.argv[1:]:
            continue
        page = run(script)
        script.with_suffix(".md").write_text(page.text, encoding="utf-8")
        for old in HERE.glob(f"{script.name[:2]}-*.png"):
            old.unlink()
        for name, data in page.pictures.items():
            (HERE / name).write_bytes(data)
        kilobytes = sum(map(len, page.pictures.values())) / 1000
        print(f"{script.stem}: {len(page.text.split())} words, pictures {kilobytes:.0f} kB")


if __name__ == "__main__":
    main()
