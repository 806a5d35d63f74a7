"""recipes/cluster, as far as one machine allows: Slurm's script runs, and both start the same."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "recipes" / "cluster" / "slurm.sh"
SMALL = (ROOT / "tests" / "small_recipe.toml").read_text().replace("steps = 60", "steps = 2")


def torchrun_options(text: str) -> set[str]:
    command = text[text.index("torchrun") : text.index("-m waveflow")]
    return set(re.findall(r"--[a-z-]+", command))


def test_both_start_torchrun_alike() -> None:
    service, job = yaml.safe_load_all((SCRIPT.parent / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [command] = pod["containers"][0]["args"]
    assert torchrun_options(command) == torchrun_options(SCRIPT.read_text())
    # The name at which the pods meet is the first pod's.
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500"
    assert host in command and pod["subdomain"] == service["metadata"]["name"]
    assert f"--nnodes {job['spec']['completions']} " in command
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


@pytest.mark.slow
def test_slurms_script_trains_and_goes_on(tmp_path: Path, tiny_corpus: Path) -> None:
    """`srun` runs what it is given once for each node, as Slurm would on each machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(
        '#!/bin/bash\npids=()\nfor i in 1 2; do "$@" & pids+=($!); done\n'
        'for pid in "${pids[@]}"; do wait "$pid" || exit 1; done\n'
    )
    (programs / "scontrol").write_text("#!/bin/sh\nprintf 'localhost\\nother\\n'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL)
    settings = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "localhost,other",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "7",
        "DEVICE": "cpu",
    }
    command = ["bash", SCRIPT, recipe, tiny_corpus, tmp_path / "run"]

    def run() -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    run()  # torchrun waits until both nodes are there
    assert (tmp_path / "run" / "checkpoints.json").is_file()
    recipe.write_text(SMALL.replace("steps = 2", "steps = 3"))
    run()
    assert list((tmp_path / "run").glob("step-*3"))
