"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch

import waveflow
import waveflow.bijections

# Names that an example may use beside those of its module.
NAMES = {"np": np, "torch": torch, "nn": torch.nn, "waveflow": waveflow}


def modules() -> list[str]:
    found = pkgutil.walk_packages(waveflow.__path__, "waveflow.")
    return ["waveflow", *(module.name for module in found if not module.name.endswith("__main__"))]


@pytest.mark.filterwarnings("ignore:.*were clipped")
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bricks = {name: getattr(waveflow.bijections, name) for name in waveflow.bijections.__all__}
    n_run, failures = 0, []
    for name in modules():
        module = importlib.import_module(name)
        for test in doctest.DocTestFinder().find(module, name, globs=vars(module) | bricks | NAMES):
            torch.manual_seed(0)
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            result = runner.run(test, out=report.append)
            n_run += result.attempted
            if result.failed:
                failures.append("".join(report))
    assert not failures, "\n".join(failures)
    # Else a finder that finds nothing would pass.
    assert n_run > 30
