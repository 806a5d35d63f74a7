# %% [markdown]
# # 4. The invertible 1x1 convolution
#
# **The question: a coupling leaves half of the channels as they are. How do the halves meet?**
#
# Two couplings with the same halves never change the first half. NICE and RealNVP swap the halves
# between couplings. Glow (Kingma and Dhariwal, 2018) learns how to mix the channels: it
# multiplies the channels at each position by one square matrix W. That is a convolution of width
# 1.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.autograd.functional import jacobian

from waveflow import Flow, check_bijection
from waveflow.bijections import (
    Affine,
    Chain,
    Coupling,
    Halves,
    InvertibleConv1x1,
    InvertibleConv1x1PLU,
    Permute,
    Reverse,
    Squeeze,
)

torch.manual_seed(0)


def coupling():
    """An affine coupling of 6 channels with a random network."""
    network = nn.Sequential(nn.Conv1d(3, 16, 1), nn.Tanh(), nn.Conv1d(16, 6, 1))
    return Coupling(network, Affine(bound=1.0), Halves())


def size_of_jacobian(bijection):
    """The absolute values of its Jacobian at a random signal of one position."""
    x = torch.randn(6, 1)
    return jacobian(lambda v: bijection(v[None])[0][0], x)[:, 0, :, 0].abs()


# %% [markdown]
# ## Why mixing is needed
#
# A picture of a Jacobian shows which z depends on which x: row i, column j is d z_i / d x_j.
# White is zero.

# %%
chains = {
    "two couplings": Chain(coupling(), coupling()),
    "with a reversal between": Chain(coupling(), Reverse(6), coupling()),
    "with a 1x1 convolution": Chain(coupling(), InvertibleConv1x1(6), coupling()),
}
figure, axes = plt.subplots(
    1, 3, figsize=(7, 2.7), layout="constrained", num="Jacobians of two couplings of 6 channels"
)
for axis, (name, chain) in zip(axes, chains.items(), strict=True):
    size = size_of_jacobian(chain)
    print(f"{name}: {int((size > 1e-6).sum())} of 36 entries are not zero")
    axis.imshow(size.sqrt(), cmap="Blues")
    axis.set(title=name, xlabel="x", ylabel="z", xticks=[], yticks=[])

# %% [markdown]
# Without mixing, the first three rows hold a single one each: these channels leave as they came.
#
# ## A permutation is a special case
#
# A permutation matrix has a single 1 in each row and in each column. A 1x1 convolution with such
# a matrix does what `Permute` does. Its determinant is 1 or -1, so log|det W| is 0.

# %%
order = [2, 0, 1, 5, 3, 4]
permute, convolution = Permute(order), InvertibleConv1x1(6)
with torch.no_grad():
    convolution.weight.copy_(torch.eye(6)[order])
    x = torch.randn(1, 6, 4)
    z, log_det = convolution(x)
print("the same z:", torch.equal(z, permute(x)[0]))
print(f"log_det: {abs(log_det.item()):.1f}")

# %% [markdown]
# A new `InvertibleConv1x1` starts as a random rotation: its determinant is 1, it keeps lengths,
# and a flow that begins with it neither explodes nor vanishes. Training then moves W freely.
#
# For a free W the log-determinant is L log|det W|, since the same matrix acts at each of the L
# positions.

# %%
rotation = InvertibleConv1x1(6)
_, log_det = rotation(x)
print(f"rotation: log_det {abs(log_det.item()):.3f}")
with torch.no_grad():
    rotation.weight.mul_(1.1)
_, log_det = rotation(x)
print(f"rotation times 1.1: log_det {log_det.item():.3f}")
print(f"4 positions x 6 channels x log 1.1: {24 * torch.tensor(1.1).log().item():.3f}")

# %% [markdown]
# ## The PLU form
#
# The determinant of a free matrix of C channels costs about C^3 operations. Glow's other form
# fixes a permutation P and learns a lower triangle L, an upper triangle U and a diagonal s:
#
#     W = P L (U + diag(s))        log|det W| = sum of log|s|
#
# The triangles have ones and zeros where the determinant looks, so only s is left. And W can
# never lose its inverse, because s is stored as a logarithm and its sign is fixed.

# %%
plu = InvertibleConv1x1PLU(6)
with torch.no_grad():
    for parameter in plu.parameters():  # as if it had been trained
        parameter.add_(0.2 * torch.randn_like(parameter))
print(f"sum of log|s|:         {plu.log_abs_det().item():.4f}")
print(f"log|det W| by slogdet: {torch.linalg.slogdet(plu.matrix())[1].item():.4f}")

# %%
figure, axes = plt.subplots(
    1, 4, figsize=(7, 2.1), layout="constrained", num="W and its factors P, L and U + diag(s)"
)
lower = plu.lower.tril(-1) + torch.eye(6)
upper = plu.upper.triu(1) + torch.diag(plu.sign * plu.log_diagonal.exp())
parts = {"W": plu.matrix(), "P": plu.permutation, "L": lower, "U + diag(s)": upper}
for axis, (name, matrix) in zip(axes, parts.items(), strict=True):
    axis.imshow(matrix.detach(), cmap="RdBu", vmin=-1.5, vmax=1.5)
    axis.set(title=name, xticks=[], yticks=[])

# %% [markdown]
# Both forms keep the contract of a bijection:

# %%
for step in (rotation, plu):
    report = check_bijection(step, torch.randn(2, 6, 4))
    print(f"{type(step).__name__}: errors below 1e-9: {max(report[:2]) < 1e-9}")

# %% [markdown]
# ## What training makes of it
#
# A flow that is nothing but a 1x1 convolution has a Gaussian density. Trained by likelihood it
# must find a W that makes the data white: the covariance of z = W x becomes the unit matrix. We
# try it with two channels that are strongly correlated.

# %%
factor = torch.tensor([[1.0, 0.0], [1.8, 0.5]])
data = torch.randn(2000, 2) @ factor.T
flow = Flow(Chain(Squeeze(2), InvertibleConv1x1(2)), channels=2)
optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
for _ in range(300):
    loss = -flow(data).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    z = flow.encode(data)[..., 0]
for name, points in (("x", data), ("z", z)):
    (a, b), (_, d) = torch.cov(points.T).tolist()
    print(f"{name}: variances {a:.2f} and {d:.2f}, covariance {abs(b):.2f}")

# %%
figure, axes = plt.subplots(
    1, 2, figsize=(6, 3), layout="constrained", num="Correlated data, and z after training"
)
for axis, points, name in zip(axes, (data, z), "xz", strict=True):
    axis.scatter(*points.T, s=1)
    axis.set(title=name, xlim=(-6, 6), ylim=(-6, 6), aspect="equal")

# %% [markdown]
# ## In one sentence
#
# A 1x1 convolution is a learned permutation: it mixes the channels so that every coupling meets
# all of them, and costs one small determinant.
#
# Next: [5. Masks](05_masks.md), which decide who sees whom.
