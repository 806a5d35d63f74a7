"""Who imports whom, and what no file of the package may do, read from its syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import waveflow

ROOT = Path(__file__).parent.parent / "waveflow"
TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}

# A part imports its own level and those before it.
LEVELS = [
    {"errors", "files", "limits", "door", "processes"},
    {"torchfile"},
    {"audio", "bijections", "budget", "buffers", "context", "decoding", "distributions", "nn"}
    | {"padding"},
    {"conditioners", "flow", "hub", "model_files", "objective", "pretrained"},
    {"models"},
    {"checkpoint"},
    {"data", "engine", "foreign", "metrics", "publish", "training"},
    {"adapters", "tts", "export"},
    {"serve"},
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
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "TTS",
    "gruut",
    "transformers",
    "torchaudio",
}
CODE_IN_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The one file that may import pickle, to derive a class from its unpickler.
UNPICKLER = Path("torchfile/unpickle.py")


def part_of(path: Path) -> str:
    return path.with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_top(tree: ast.Module) -> set[str]:
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in at_top for name in imported(node)}


def packages(names: set[str] | Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords if k.arg is not None}
            yield ast.unparse(node.func), keywords


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def broken_levels(path: Path, tree: ast.Module) -> Iterator[str]:
    part = part_of(path)
    for name in imported(tree):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if other in waveflow._WHERE:  # a public name, as a file outside the package imports it
            other = waveflow._WHERE[other].split(".")[1]
        # The package's own names are loaded when they are used.
        if first != "waveflow" or other == "__version__" or part == "__init__":
            continue
        if LEVEL[other] > LEVEL[part] or (part, other) in STRANGERS:
            yield f"{path} imports {name}"


def executed(path: Path, tree: ast.Module) -> Iterator[str]:
    """Where a file may execute what it reads."""
    found = packages(imported(tree)) & CODE_IN_DATA - ({"pickle"} if path == UNPICKLER else set())
    yield from (f"{path} imports {name}" for name in found)
    for function, keywords in calls(tree):
        allowed = {
            "torch.load": is_constant(keywords.get("weights_only"), True),
            "np.load": is_constant(keywords.get("allow_pickle"), False),
            "numpy.load": is_constant(keywords.get("allow_pickle"), False),
        }
        if function in {"eval", "exec", "compile", "__import__"} or not allowed.get(function, True):
            yield f"{path} calls {function}"


def early_options(path: Path, tree: ast.Module) -> Iterator[str]:
    names = imported_at_top(tree)
    if packages(names) & OPTIONAL or any("torch.utils.tensorboard" in name for name in names):
        yield str(path)


def prints(path: Path, tree: ast.Module) -> bool:
    return "print" in {function for function, _ in calls(tree)}


def test_imports_go_down_the_levels() -> None:
    assert [line for item in TREES.items() for line in broken_levels(*item)] == []


def test_a_model_is_a_page() -> None:
    """WaveGlow, which came before the zoo, is longer, and FrameGlow is a folder."""
    longer = {"waveglow.py", "registry.py"}
    pages = {path for path in (ROOT / "models").glob("*.py") if path.name not in longer}
    assert len(pages) > 10
    assert not [path.name for path in pages if len(path.read_text().splitlines()) > 120]
    parts = [*(ROOT / "models" / "frameglow").glob("*.py")]
    assert parts and not [p.name for p in parts if len(p.read_text().splitlines()) > 240]


def test_no_torchaudio() -> None:
    """But for its own Tacotron 2."""
    users = [path for path, tree in TREES.items() if "torchaudio" in packages(imported(tree))]
    assert users == [Path("tts/foreign.py")]


def test_optional_packages_are_imported_where_they_are_used() -> None:
    assert [line for item in TREES.items() for line in early_options(*item)] == []


def test_nothing_from_a_file_is_executed() -> None:
    assert [line for item in TREES.items() for line in executed(*item)] == []


def test_pickle_only_lends_a_base_class() -> None:
    """No load, no loads: of the module pickle, only the class and the codes of operations."""
    tree = TREES[UNPICKLER]
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


def test_only_the_console_prints() -> None:
    assert [str(path) for path, tree in TREES.items() if prints(path, tree)] == ["cli/console.py"]


def test_the_checks_above_see_something() -> None:
    """Else a wrong root, or a name that is spelled otherwise, would pass them all."""
    assert len(TREES) > 30
    assert {part_of(path) for path in TREES} - {"__init__"} <= LEVEL.keys()
    tree = ast.parse(
        "import torchaudio.io, wandb\nfrom waveflow.cli import main\nimport waveflow.engine\n"
        "from pickle import load\ntorch.load(f, x=eval(y))\nnp.load(f)\nprint(1)"
    )
    bad = Path("nn/bad.py")
    assert "torchaudio" in packages(imported(tree))
    assert list(broken_levels(bad, tree)) == [
        "nn/bad.py imports waveflow.cli.main",
        "nn/bad.py imports waveflow.engine",
    ]
    assert list(broken_levels(Path("engine/x.py"), ast.parse("import waveflow.training.loop")))
    assert sorted(executed(bad, tree)) == [
        "nn/bad.py calls eval",
        "nn/bad.py calls np.load",
        "nn/bad.py calls torch.load",
        "nn/bad.py imports pickle",
    ]
    assert list(early_options(bad, tree)) == ["nn/bad.py"] and prints(bad, tree)
    assert list(executed(bad, ast.parse("torch.load(f, weights_only=True)"))) == []
