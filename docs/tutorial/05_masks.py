# %% [markdown]
# # 5. Masks
#
# **The question: how do we make sure that a result depends only on what it may depend on?**
#
# A flow needs zeros at the right places of its Jacobian; then its determinant is cheap. Masks put
# them there. They are of two kinds: masks on the **weights** of a network (MADE, WaveNet), and
# masks on the **signal** (couplings). The Jacobian shows both.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.autograd.functional import jacobian

from waveflow.bijections import (
    Affine,
    Chain,
    Condition,
    Coupling,
    EvenOdd,
    Halves,
    Inverse,
    OverChannels,
    OverTime,
    Squeeze,
)
from waveflow.context import context_of
from waveflow.nn.causal_wavenet import CausalWaveNet
from waveflow.nn.made import MADE
from waveflow.nn.row_net import RowNet

torch.manual_seed(0)


def with_random_weights(network):
    """New networks here give zeros, so that a new flow is the identity; this one does not."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5)
    return network


def draw(axis, matrix, title):
    """A matrix as a picture: white is zero."""
    axis.imshow(matrix.detach().abs().sqrt(), cmap="Blues", vmin=0)
    axis.set(title=title, xticks=[], yticks=[])


# %% [markdown]
# ## MADE: masks on weights
#
# An autoregressive step maps x_i with parameters that depend on x_1 ... x_(i-1) only. MADE
# (Germain and others, 2015) gives the parameters of all i in one pass. Its rule:
#
# - input i has the degree i, and output i has the degree i;
# - each hidden unit has some degree;
# - a hidden unit sees units of its own degree or less; an output sees units of less than its own.
#
# On every path from an input to an output the degree never falls, and rises at the last step. So
# output i sees the inputs before i, and nothing else. The rule is a table of zeros and ones for
# each layer, by which its weights are multiplied.

# %%
made = with_random_weights(MADE(6, 0, 24, 1))
masks = {"input": made.mask_in, "hidden": made.mask_hidden, "output": made.mask_out}
product = made.mask_out @ made.mask_hidden @ made.mask_in
print("paths from input (column) to output (row):")
for row in product.int().tolist():
    print("".join(f"{paths:5d}" for paths in row))

# %% [markdown]
# No path leads from an input to an output of the same number or a smaller one. The Jacobian of
# the network has its zeros at the same places. (A path may also be zero because its ReLU is
# silent, so we add up the Jacobians of 30 positions.)

# %%
x = torch.randn(6, 30)
of_network = jacobian(lambda v: made(v[None])[0], x).abs().sum((1, 3))
print("strictly below the diagonal:", torch.equal(of_network, of_network.tril(-1)))
print("nothing else is zero:", torch.equal(of_network > 0, product > 0))

step = OverChannels(with_random_weights(MADE(6, 0, 24, 2)), Affine(bound=1.0), 6)
of_step = jacobian(lambda v: step(v[None])[0][0], x).abs().sum((1, 3))

figure, axes = plt.subplots(
    1, 5, figsize=(8, 2.2), layout="constrained", num="MADE's masks and Jacobians"
)
for axis, (name, mask) in zip(axes, masks.items(), strict=False):
    draw(axis, mask, f"mask: {name}")
draw(axes[3], of_network, "d params / d x")
draw(axes[4], of_step, "d z / d x")

# %% [markdown]
# The last picture is the Jacobian of the whole step z_i = x_i exp(s_i) + t_i. The network fills
# the part below the diagonal, and x_i itself fills the diagonal. The determinant of such a
# triangle is the product of its diagonal.
#
# ## WaveNet: masks in time
#
# A causal convolution is a mask too: its kernel has no weights for the future. The input is moved
# by one sample, so that the present is hidden as well. With dilations 1, 2, 4 the network looks
# far back with few layers. `context_of` says how far.

# %%
wavenet = with_random_weights(CausalWaveNet(1, 1, 8, 2, [1, 2, 4]))
print("positions it sees to the left and right:", tuple(context_of(wavenet)))
step = OverTime(wavenet, Affine(bound=1.0))
no_mel = Condition(torch.zeros(1, 1, 24))
of_time = jacobian(lambda v: step(v[None, None], no_mel)[0][0, 0], torch.randn(24))
print("lower triangle:", torch.equal(of_time, of_time.tril()))

# %% [markdown]
# ## Rows: masks over a matrix
#
# WaveFlow folds audio into a matrix of a few rows and is autoregressive over the rows. The
# parameters of an element may see all earlier rows, on both sides in time, and nothing of its own
# row. (PixelCNN goes through the pixels of an image, and sees the earlier pixels of its own row
# too.)

# %%
rows = with_random_weights(RowNet(8, 1, 8, 2, [1, 2, 4]))
features = torch.zeros(1, 1, 25)  # again none of a mel


def shift_of_one(x):
    """The shift of the element in row 5, column 12."""
    return rows(x[None], features)[0, 5, 12]


seen = jacobian(shift_of_one, torch.randn(8, 25)).abs()
print("sees its own row or a later one:", bool(seen[5:].any()))
print("columns that it sees in row 4:", (seen[4] > 0).nonzero()[:, 0].tolist())

figure, axes = plt.subplots(
    1, 2, figsize=(7, 2.8), layout="constrained", num="What WaveNet and WaveFlow may see"
)
draw(axes[0], of_time, "WaveNet: d z / d x")
draw(axes[1], seen, "WaveFlow: seen by one element (x)")
axes[1].plot(12, 5, "x", color="C3")

# %% [markdown]
# ## Couplings: masks on the signal
#
# A coupling splits the channels in two parts: the **passive** part stays and is what the network
# sees, and the **active** part is mapped. RealNVP uses two masks. In a **checkerboard**,
# neighbours are in different parts; a **channel mask** halves the channels after a squeeze. A
# waveform has one axis, so its checkerboard is every second sample.
#
# We do not draw the masks from their definition. We run couplings and look at which of 32 samples
# come out changed.


# %%
def active(n, split):
    """Which samples a coupling changes, after a squeeze by n."""
    network = nn.Conv1d(n // 2, n, 1)
    there_and_back = Chain(
        Squeeze(n), Coupling(network, Affine(bound=1.0), split), Inverse(Squeeze(n))
    )
    x = torch.randn(1, 1, 32)
    return (there_and_back(x)[0] != x)[0, 0]


choices = {
    "Squeeze(8), EvenOdd()": active(8, EvenOdd()),
    "Squeeze(8), EvenOdd(swap=True)": active(8, EvenOdd(swap=True)),
    "Squeeze(8), Halves()": active(8, Halves()),
    "Squeeze(16), Halves()": active(16, Halves()),
    "Squeeze(16), Halves(swap=True)": active(16, Halves(swap=True)),
}
for name, mapped in choices.items():
    print(f"{name:32s}", "".join("#" if m else "." for m in mapped.tolist()))

# %% [markdown]
# `#` is active and `.` is passive. `EvenOdd` is the checkerboard and `Halves` the channel mask.
# With `swap` the parts change their roles, so that after two couplings every sample was mapped
# once.
#
# The Jacobian of a coupling of 8 channels has a diagonal of ones for the passive channels. Rows
# of active channels see the passive ones and themselves, never each other.

# %%
figure, axes = plt.subplots(
    1, 2, figsize=(5, 2.7), layout="constrained", num="Jacobians of couplings of 8 channels"
)
for axis, split in zip(axes, (EvenOdd(), Halves()), strict=True):
    coupling = Coupling(nn.Conv1d(4, 8, 1), Affine(bound=1.0), split)
    table = jacobian(lambda v, c=coupling: c(v[None])[0][0], torch.randn(8, 1))[:, 0, :, 0]
    draw(axis, table, repr(split))
    print(f"{split!r}: {int((table != 0).sum())} of 64 entries are not zero")

# %% [markdown]
# 8 entries on the diagonal and 4 times 4 of the network: 24.
#
# ## In one sentence
#
# A mask is a promise about zeros of the Jacobian, and the Jacobian itself is the test of it.
#
# Next: [6. MAF against IAF](06_maf_iaf.md): the same mask, used in two directions.
