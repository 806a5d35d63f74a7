"""Who imports whom, and what no file of the package may do, read from its syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "waveflow"
FILES = sorted(ROOT.rglob("*.py"))

# A part imports its own level and those before it.
LEVELS = [
    {"errors", "files"},
    {"audio", "nn", "bijections", "distributions", "pretrained"},
    {"flow", "objective"},
    {"models"},
    {"checkpoint"},
    {"data", "metrics", "training", "engine", "foreign"},
    {"tts", "export"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
STRANGERS = [("bijections", "nn"), ("nn", "bijections"), ("engine", "training")]
OPTIONAL = {
    "pyworld",
    "pesq",
    "pystoi",
    "speechmos",
    "tensorboard",
    "matplotlib",
    "distillmos",
    "wandb",
}
CODE_IN_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The one file that may import pickle, to derive a class from its unpickler.
UNPICKLER = ROOT / "foreign" / "unpickle.py"


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords if k.arg is not None}
            yield ast.unparse(node.func), keywords


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_imports_go_down_the_levels(path: Path, tree: ast.Module) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the package's own names, loaded when they are used
    for name in imported(tree):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first != "waveflow" or other == "__version__":
            continue
        assert LEVEL[other] <= LEVEL[part], f"{part} imports {name}"
        assert (part, other) not in STRANGERS, f"{part} imports {name}"


def test_no_torchaudio(tree: ast.Module) -> None:
    assert "torchaudio" not in {name.partition(".")[0] for name in imported(tree)}


def test_optional_packages_are_imported_where_they_are_used(tree: ast.Module) -> None:
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name for node in at_top for name in imported(node)}
    assert not {name.partition(".")[0] for name in names} & OPTIONAL
    assert not any(name.startswith("torch.utils.tensorboard") for name in names)


def test_nothing_from_a_file_is_executed(path: Path, tree: ast.Module) -> None:
    found = {name.partition(".")[0] for name in imported(tree)} & CODE_IN_DATA
    assert found == ({"pickle"} if path == UNPICKLER else set())
    for function, keywords in calls(tree):
        assert function not in {"eval", "exec", "compile", "__import__"}
        if function == "torch.load":
            assert is_constant(keywords.get("weights_only"), True)
        if function in {"np.load", "numpy.load"}:
            assert is_constant(keywords.get("allow_pickle"), False)


def test_pickle_only_lends_a_base_class() -> None:
    """No load, no loads: of the module pickle, only the class and the codes of operations."""
    tree = ast.parse(UNPICKLER.read_text(encoding="utf-8"))
    assert [name for name in imported(tree) if name.startswith("pickle")] == ["pickle"]
    (bases,) = [node.bases for node in tree.body if "Unpickler" in getattr(node, "name", "")]
    assert [ast.unparse(base) for base in bases] == ["pickle._Unpickler"]
    uses = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Call)
        and any(getattr(child, "id", "") == "pickle" for child in ast.iter_child_nodes(node))
    ]
    assert set(uses) == {"pickle._Unpickler", "getattr(pickle, name)"}
    n_names = sum(getattr(node, "id", "") == "pickle" for node in ast.walk(tree))
    assert len(uses) == n_names


def test_the_library_prints_nothing(path: Path, tree: ast.Module) -> None:
    if part_of(path) not in {"cli", "__main__"}:
        assert "print" not in {function for function, _ in calls(tree)}


def test_the_checks_above_see_something() -> None:
    """Else a wrong root, or a name that is spelled otherwise, would pass them all."""
    assert len(FILES) > 30
    assert {part_of(path) for path in FILES} - {"__init__"} <= LEVEL.keys()
    tree = ast.parse("import torchaudio.io\nfrom pickle import load\ntorch.load(f, x=eval(y))")
    assert set(imported(tree)) == {"torchaudio.io", "pickle.load"}
    assert {function for function, _ in calls(tree)} == {"torch.load", "eval"}
