# %% [markdown]
# # 8. Build your own flow, and prove it
#
# **The question: what do I write to have a flow of my own trained, saved and loaded, and how do I
# know that it is right?**
#
# You need a clone of the repository and its packages:
#
#     pip install -e '.[dev]'
#
# This page is a script, and this runs all of it:
#
#     python docs/tutorial/08_build_your_own.py
#
# For a flow of your own, copy the script and `docs/tutorial/my_flow.py` into one folder and
# change both. In the script, change the step and its config wherever they appear (the import,
# `check_bijection`, the small config), the recipe's `type` and sizes, and the line that prints mu.
#
# ## 1. An idea
#
# Samples of speech crowd around zero, and a few are large. Telephones have long squeezed such
# samples by a logarithm, the mu-law:
#
#     z = sign(x) log(1 + mu |x|) / log(1 + mu)
#
# It is invertible, so it can be a step of a flow, with mu as a parameter that is learned. The
# library has no such step. We write it.
#
# A bijection has two methods and a declaration:
#
# - `forward(x, cond)` returns z and the log-determinant, one number for each item of the batch;
# - `inverse(z, cond)` returns x and the log-determinant of this direction;
# - `context` says how many positions to the left and right a result depends on. Here there are
#   none. It has no default: a training refuses a model whose step declares none.
#
# A step that treats each sample by itself has a diagonal Jacobian. So its log-determinant is the
# sum of log dz/dx over all samples. `sum_log_det` adds them up, and leaves out the padding of a
# batch. It takes a value for each sample (B, C, L): a parameter for each channel is expanded
# first, with `expand_as(x)`.

# %%
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

import waveflow
from waveflow import check_bijection
from waveflow.audio.io import read_audio, write_audio
from waveflow.bijections import Bijection, Condition
from waveflow.bijections.base import sum_log_det
from waveflow.checkpoint import save_checkpoint
from waveflow.cli.main import main
from waveflow.errors import ContractError
from waveflow.models.registry import build_flow

torch.manual_seed(0)


class FirstTry(Bijection):
    """The mu-law, with a mistake."""

    context = (0, 0)

    def __init__(self, mu):
        super().__init__()
        self.log_mu = nn.Parameter(torch.tensor(mu).log())

    def forward(self, x, cond=None):
        mu = self.log_mu.exp()
        z = x.sign() * (mu * x.abs()).log1p() / mu.log1p()
        return z, sum_log_det(self.log_slope(x), cond)

    def inverse(self, z, cond=None):
        mu = self.log_mu.exp()
        x = z.sign() * (mu.log1p() * z.abs()).expm1() / mu
        return x, sum_log_det(-self.log_slope(x), cond)

    def log_slope(self, x):
        mu = self.log_mu.exp()
        return self.log_mu - (mu * x.abs()).log1p()


# %% [markdown]
# ## 2. Prove it
#
# The inverse is right, so a round trip alone finds nothing. A flow with a wrong log-determinant
# trains without an error, and its likelihood means nothing. `check_bijection` compares it with
# the Jacobian. Give it a small random signal (B, C, L) of two items or more.

# %%
first_try = FirstTry(16.0)
x = 0.3 * torch.randn(2, 1, 10)
print("round trip:", torch.allclose(first_try.inverse(first_try(x)[0])[0], x, atol=1e-6))
try:
    check_bijection(first_try, x)
except ContractError as error:
    print("ContractError:", error)

# %% [markdown]
# The numbers help to find the mistake. We look at the difference for each of the 10 samples:

# %%
z, log_det = first_try(x)
jacobian = torch.autograd.functional.jacobian(lambda v: first_try(v[None, None])[0][0, 0], x[0, 0])
difference = (log_det[0] - torch.linalg.slogdet(jacobian)[1]).item() / 10
print(f"too much for each sample: {difference:.4f}")
print(f"log log(1 + mu):          {torch.tensor(17.0).log().log().item():.4f}")

# %% [markdown]
# The division by log(1 + mu) was forgotten. Its logarithm belongs into the slope:
#
#     log dz/dx = log mu - log(1 + mu |x|) - log log(1 + mu)
#
# ## 3. A model in a file
#
# A model is one file: bijections of its own if it has any, a **config** with a name and the
# sizes, and a **builder** that joins bijections and networks into a `Flow`. `@register` makes the
# name known to the library. This is all of `docs/tutorial/my_flow.py`, with the mistake mended:

# %% [file] my_flow.py

# %% [markdown]
# Three points may not be obvious.
#
# - The squeeze comes first, because the condition (features of the mel) has the resolution after
#   the squeeze.
# - Each coupling maps the even or the odd samples of a vector of 16, and its network sees the
#   others and the mel's features.
# - The last step is a coupling without a passive part: the mel alone gives a level and a shift.
#   Mels tell how loud speech is; without this step the couplings would have to learn it.
# - `Flow` is told how many samples a vector and a mel frame have, `channels` and `hop_length`.
# - The map of a coupling, here `Affine`, can be yours too: `n_params`, and `forward(x, params)` and
#   `inverse(z, params)`, which return the log-slope of each sample (`bijections/elementwise.py`).
#
# Now the step passes, also in a padded batch: the mask says that the second item has only 4 of 6
# positions.

# %%
from my_flow import MuLaw, MuLawConfig

report = check_bijection(MuLaw(16.0), x)
print(f"round trip below 1e-9: {report.round_trip < 1e-9}")
print(f"log-determinant below 1e-9: {report.log_det_error < 1e-9}")
print("depends on positions around it:", tuple(report.context))

mask = torch.tensor([[[1.0] * 6], [[1.0] * 4 + [0.0] * 2]])
cond = Condition(torch.randn(2, 3, 6), mask)
check_bijection(MuLaw(16.0), 0.3 * torch.randn(2, 4, 6), cond)

# %% [markdown]
# The whole model is a bijection too, so the same function proves it. New networks here give
# zeros; random weights test more. The condition stays: 24 samples are 6 vectors of 4, and 3 is
# `n_features`.

# %%
small = MuLawConfig(squeeze_factor=4, n_flows=2, hidden_channels=8, n_features=3)
mel_settings = waveflow.MelConfig(
    sample_rate=8000, n_fft=64, hop_length=8, win_length=64, n_mels=5, f_max=4000.0
)
flow = build_flow(small, mel_settings)
with torch.no_grad():
    for parameter in flow.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
report = check_bijection(flow.bijection, 0.3 * torch.randn(2, 1, 24), cond)
print(f"errors below 1e-6: {max(report[:2]) < 1e-6}")
print("it looks at samples around it:", tuple(report.context))

# %% [markdown]
# Two couplings, whose networks see 2 vectors of 4 samples on each side, look at 16 samples.
#
# ## 4. Train it
#
# Any folder of recordings will do. A fresh clone has none, but it has a model that speaks, and
# one mel. So we let it say a second of a sentence four times, each time with other noise. We work
# in an empty folder with a random name. Give `os.chdir` a folder of yours to find the run again;
# a second run of the script then needs an empty one.

# %%
os.chdir(tempfile.mkdtemp())
Path("corpus/wavs").mkdir(parents=True)
vocoder = waveflow.load()
mel = vocoder.example_mel()[:, 40:126]
for seed in range(4):
    speech = vocoder(mel, seed=seed)
    write_audio(f"corpus/wavs/clip{seed}.wav", speech.numpy(), vocoder.sample_rate)
Path("corpus/metadata.csv").write_text("".join(f"clip{seed}|words\n" for seed in range(4)))
Path("corpus/val.txt").write_text("clip3\n")
print(f"4 clips of {len(speech) / vocoder.sample_rate:.1f} s; clip3 is kept for validation")

# %% [markdown]
# A recipe names the model, its sizes, the mel and the training's settings.

# %%
RECIPE = """
mel = "hifigan"

[model]
type = "mu-law"
n_flows = 2

[train]
steps = 40
batch_size = 4
segment_frames = 16
learning_rate = 5e-3
warmup_steps = 10
validate_every = 40
ema_decay = 0.9
"""
Path("recipe.toml").write_text(RECIPE)

# %% [markdown]
# `main` is the command `waveflow`; its result is the exit status, and 0 is success. We start it
# from Python, because the command alone knows only the models of the library, and here `my_flow`
# is imported. `prepare` makes a cache of the recordings, and `train` trains. (`--workers 1` keeps
# the work in this process. Other processes would import this script anew and run it again; a
# script that wants them puts its code under `if __name__ == "__main__":`.)

# %%
status = main(["prepare", "corpus", "-o", "data", "--workers", "1"])
print("exit status:", status)

status = main(["train", "recipe.toml", "--data", "data", "--out", "run"])
print("exit status:", status)

# %% [markdown]
# On a command line, where `FOLDER` is the one that holds `my_flow.py`, the training is
#
#     PYTHONPATH=FOLDER:$PYTHONPATH python -c \
#         "import sys, my_flow; from waveflow.cli.main import main; sys.exit(main())" \
#         train recipe.toml --data data --out run
#
# The same line serves every command. `compare nice --recipes recipe.toml --steps 200 --data data`
# trains your flow beside one of ours and prints a table.
#
# A run is resumed with `--resume`, and stops after `--max-minutes`. A real training takes hours;
# these few steps only show that everything works.
#
# ## 5. Load it and let it speak
#
# A run's folder is a model. `my_flow` must be imported before it is loaded: a checkpoint names a
# type and never brings code.

# %%
mine = waveflow.load("run")
print(mine.config.model)
audio = torch.from_numpy(read_audio("corpus/wavs/clip3.wav")[0])
untrained = build_flow(mine.config.model, mine.config.mel).eval()
with torch.no_grad():
    before = untrained(audio[None], mel[None]).item()
print(f"log-likelihood of clip3: {before:.2f} before, {mine.log_prob(audio, mel).item():.2f} after")
print(f"mu: 16.00 before, {mine.flow.bijection[1].log_mu.exp().item():.2f} after")
draw = mine(mel, refine=0)
print("a draw:", tuple(draw.shape), "samples, finite:", bool(draw.isfinite().all()))
pieces = list(mine.stream(mel.split(20, dim=1), refine=0))
print("a stream equals the whole:", torch.allclose(torch.cat(pieces), draw, atol=1e-5))

# %% [markdown]
# Save and load are exact: the same weights, and the same likelihood.

# %%
save_checkpoint(Path("copy"), mine.config, mine.flow.state_dict())
copy = waveflow.load("copy")
print("equal:", torch.equal(copy.log_prob(audio, mel), mine.log_prob(audio, mel)))

# %% [markdown]
# ## 6. Keep it
#
# - In a project of your own, import the file before you train or load.
# - In this repository, put the file into `waveflow/models/`; it is then found by itself. A recipe
#   `recipes/zoo/NAME.toml` gives `waveflow compare` its name. Put a
#   new bijection into a file of its own in `waveflow/bijections/`. Add a small config to
#   `tests/small_models.py`, and the tests of all models (padded batches, streams, checkpoints,
#   `check_bijection`) run on yours.
#
# ## In one sentence
#
# Write `forward`, `inverse` and `context`; let `check_bijection` find the mistakes; register a
# config and a builder, and all commands work with your flow.
#
# Back to [the list of pages](README.md).
