# %% [markdown]
# # 2. The Jacobian and its determinant
#
# **The question: in two dimensions and more, what takes the place of the slope?**
#
# In one dimension the slope says how much longer a small interval becomes. In two dimensions we
# ask how much larger a small square becomes. The answer is the absolute value of a determinant.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Polygon
from torch import nn
from torch.autograd.functional import jacobian

from waveflow import Flow, check_bijection
from waveflow.bijections import Affine, Chain, Coupling, Halves, InvertibleConv1x1, Squeeze

torch.manual_seed(0)


def as_signal(points):
    """Points (N, 2) as N signals of two channels and one position, (N, 2, 1)."""
    return points[:, :, None]


def area(corners):
    """The area of a polygon with corners (N, 2), by the shoelace formula."""
    x, y = corners.T
    return 0.5 * (x @ y.roll(-1) - y @ x.roll(-1)).abs().item()


def linear(matrix):
    """The map x = matrix z, as the inverse direction of a 1x1 convolution."""
    step = InvertibleConv1x1(2)
    with torch.no_grad():
        step.weight.copy_(torch.linalg.inv(torch.tensor(matrix)))
    return step


# %% [markdown]
# ## The unit square becomes a parallelogram
#
# A linear map of two numbers is a matrix A: x = A z. It sends the corners of the unit square to
# the corners of a parallelogram, whose sides are the columns of A.
#
# In the library a matrix that mixes the channels is an `InvertibleConv1x1`. Its `forward` goes
# from x to z, so it holds the inverse of A, and its `inverse` is x = A z.

# %%
square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
step = linear([[1.5, 0.5], [0.3, 1.0]])
with torch.no_grad():
    corners, log_det = step.inverse(as_signal(square))
corners = corners[..., 0]

print("corners:", [[round(v, 1) for v in corner] for corner in corners.tolist()])
print(f"area of the parallelogram: {area(corners):.2f}")
print(f"determinant of A:          {1.5 * 1.0 - 0.5 * 0.3:.2f}")
print(f"exp of the step's log_det: {log_det[0].exp().item():.2f}")

# %%
figure, axis = plt.subplots(
    figsize=(4, 2.8), layout="constrained", num="The unit square and its parallelogram"
)
axis.add_patch(Polygon(square, alpha=0.4, color="C0", label="unit square, area 1"))
axis.add_patch(Polygon(corners, alpha=0.4, color="C1", label=f"image, area {area(corners):.2f}"))
axis.set(xlim=(-0.2, 2.4), ylim=(-0.2, 1.9), aspect="equal")
axis.legend(loc="upper left")

# %% [markdown]
# The determinant of A is the area of the parallelogram, with a sign: it is negative where the map
# turns the square over. Only the area counts, so flows use its absolute value.
#
# ## An example to do by hand
#
# Let z1 and z2 be uniform on [0, 1], and x = (z1 + z2, 2 z1). The table of all derivatives is the
# Jacobian:
#
#     d x1 / d z1 = 1     d x1 / d z2 = 1
#     d x2 / d z1 = 2     d x2 / d z2 = 0
#
# Its determinant is 1 * 0 - 1 * 2 = -2. The square of area 1 becomes a parallelogram of area 2,
# so the density, which was 1, becomes 1/2.

# %%
step = linear([[1.0, 1.0], [2.0, 0.0]])
z = torch.rand(200_000, 2)
with torch.no_grad():
    x, log_det = step.inverse(as_signal(z))
table = jacobian(lambda v: step.inverse(v[None])[0][0], as_signal(z)[0])[:, 0, :, 0]
print("Jacobian by autograd:", [[round(v, 4) for v in row] for row in table.tolist()])
print(f"its determinant: {torch.linalg.det(table).item():.3f}")
print(f"the step's log_det: {log_det[0].item():.4f}, log 2: {torch.tensor(2.0).log().item():.4f}")

# %% [markdown]
# Draws agree. We count those in a small box around (1, 1) and divide by the area of the box.

# %%
near = ((x[..., 0] - 1).abs() < 0.1).all(1)
print(f"density of x near (1, 1), counted: {near.float().mean().item() / 0.2**2:.2f}")

figure, axes = plt.subplots(
    1, 2, figsize=(6.5, 3.2), layout="constrained", num="x = (z1 + z2, 2 z1) of uniform z"
)
for axis, points, name in zip(axes, (z, x[..., 0]), "zx", strict=True):
    axis.scatter(*points[:3000].T, s=1)
    axis.set(title=name, xlim=(-0.2, 2.2), ylim=(-0.2, 2.2), aspect="equal")

# %% [markdown]
# ## A curved map
#
# A curved map has another Jacobian at each point. There it says how the map treats a very small
# square: the image is nearly a parallelogram.
#
# An affine **coupling** is such a map. It leaves x1 as it is and maps x2 to z2 = x2 exp(s(x1)) +
# t(x1), where s and t are any functions, here a small network. `bound=1.0` keeps s between -1 and
# 1, so that the picture stays small.

# %%
torch.manual_seed(6)
network = nn.Sequential(nn.Conv1d(1, 16, 1), nn.Tanh(), nn.Conv1d(16, 2, 1))
with torch.no_grad():
    for layer, spread in ((network[0], 0.7), (network[2], 0.35)):
        for parameter in layer.parameters():
            parameter.normal_(0, spread)
coupling = Coupling(network, Affine(bound=1.0), Halves())
print(coupling)

# %%
lines = torch.linspace(-2, 2, 17)
fine = torch.linspace(-2, 2, 100)
figure, axes = plt.subplots(
    1, 2, figsize=(7, 3.4), layout="constrained", num="A grid and its image under a coupling"
)
small = 0.25 * square + torch.tensor([0.75, 0.5])
with torch.no_grad():
    for line in lines:
        for points in (
            torch.stack([line.expand(100), fine], 1),
            torch.stack([fine, line.expand(100)], 1),
        ):
            axes[0].plot(*points.T, color="C0", linewidth=0.6)
            axes[1].plot(*coupling(as_signal(points))[0][..., 0].T, color="C0", linewidth=0.6)
    image = coupling(as_signal(small))[0][..., 0]
for axis, corners, name in zip(axes, (small, image), ("x", "z"), strict=True):
    axis.add_patch(Polygon(corners, color="C1"))
    axis.set(title=name, aspect="equal")

# %% [markdown]
# The Jacobian of this coupling is triangular, because z1 does not depend on x2:
#
#     J = [[1, 0], [..., exp(s(x1))]]
#
# The determinant of a triangular matrix is the product of its diagonal, here exp(s(x1)). So
# log_det is s(x1), and nobody computes a determinant. The corner marked `...` holds the
# derivatives of the network. They may be anything, because they do not enter the determinant.
# That is why the network may be any network, and need not be invertible.

# %%
point = torch.tensor([[[0.8], [0.6]]])
table = jacobian(lambda v: coupling(v[None])[0][0], point[0])[:, 0, :, 0]
_, log_det = coupling(point)
print("Jacobian:")
for row in table.tolist():
    print("   ".join(f"{value:7.4f}" for value in row))
print(f"log of its determinant: {torch.linalg.det(table).log().item():.4f}")
print(f"the coupling's log_det: {log_det.item():.4f}")

# %% [markdown]
# `check_bijection` does this for any bijection: it computes the Jacobian by autograd, compares
# its determinant with `log_det`, and tries the inverse.

# %%
report = check_bijection(coupling, torch.randn(3, 2, 5))
print(f"errors below 1e-9: {report.round_trip < 1e-9 and report.log_det_error < 1e-9}")

# %% [markdown]
# ## The density
#
# With the determinant in the slope's place the formula is that of page 1:
#
#     log p(x) = log N(f(x)) + log |det J(x)|
#
# A `Flow` takes audio, and here a point is audio of two samples: `Squeeze(2)` makes two channels
# of them. `flow(x)` is the log-likelihood **per sample**, so a point has twice that. The whole
# probability is 1, as it must be.

# %%
flow = Flow(Chain(Squeeze(2), coupling), channels=2)
axis = torch.linspace(-12, 12, 601)
grid = torch.cartesian_prod(axis, axis)
with torch.no_grad():
    log_density = 2 * flow(grid)
cell = (axis[1] - axis[0]).item() ** 2
print(f"whole probability: {(log_density.exp().sum() * cell).item():.3f}")

# %% [markdown]
# ## In one sentence
#
# The absolute determinant of the Jacobian is the factor by which a map changes small areas, and
# flows are built so that this determinant is cheap.
#
# Next: [3. Two moons](03_two_moons.md), the first trained flows.
