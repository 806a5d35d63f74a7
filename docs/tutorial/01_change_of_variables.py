# %% [markdown]
# # 1. Change of variables in one dimension
#
# **The question: z is Gaussian and x is a function of z. What is the density of x?**
#
# A density is not a probability. A probability is an area: density times width. When a function
# stretches an interval of z to twice its width, the interval keeps its probability. So its
# density is halved. That is all of the change of variables; the rest of this page says it with
# numbers.

# %%
import matplotlib.pyplot as plt
import torch

from waveflow import Flow, check_bijection
from waveflow.bijections import ActNorm, Bijection, Chain, InvertibleConv1x1, RationalQuadratic
from waveflow.distributions import standard_normal_log_prob
from waveflow.errors import ContractError


def area(density, left, right):
    """The area under a density between two points."""
    x = torch.linspace(left, right, 10_001)
    return torch.trapezoid(density(x), x).item()


def gaussian(z):
    """The density of a standard normal; the library has its logarithm, for signals (B, C, L)."""
    return standard_normal_log_prob(z[:, None, None]).exp()


# %% [markdown]
# ## A stretch
#
# A **bijection** is an invertible map. In this library `forward` goes from the data x to the
# noise z, and `inverse` goes from z to x. Both also return the logarithm of the absolute slope.
#
# The simplest bijection is `ActNorm`: z = (x + b) exp(s). With b = -2 and exp(s) = 1/2 it is z =
# (x - 2) / 2. Backwards it is x = 2 z + 2: it stretches z by 2 and moves it by 2.
#
# A signal has the shape (B, C, L): B items, C channels, L positions. A number is a signal of the
# shape (1, 1, 1).

# %%
stretch = ActNorm(1).eval()
with torch.no_grad():
    stretch.shift.fill_(-2.0)
    stretch.log_scale.fill_(torch.tensor(0.5).log())

z, log_slope = stretch(torch.tensor([[[4.0]]]))
print(f"x = 4 goes to z = {z.item():.1f}; the slope is {log_slope.exp().item():.1f}")
x, log_slope = stretch.inverse(z)
print(f"z = 1 goes to x = {x.item():.1f}; the slope is {log_slope.exp().item():.1f}")

# %% [markdown]
# A `Flow` joins a bijection with a standard normal at its end. `flow(x)` is the logarithm of the
# density of x:
#
#     log p(x) = log N(f(x)) + log |f'(x)|        z = f(x), the direction `forward`
#
# Here the slope f' is 1/2, so the density of x is half as high as that of z, and twice as wide.
# Every interval keeps its area.

# %%
flow = Flow(stretch)


def density(x):
    """The density of the numbers x (N,)."""
    with torch.no_grad():
        return flow(x[:, None]).exp()


print(f"area of z between -1 and 1: {area(gaussian, -1, 1):.4f}")
print(f"area of x between  0 and 4: {area(density, 0, 4):.4f}")
print(f"whole area of x:            {area(density, -18, 22):.4f}")
print(f"without the slope:          {area(lambda x: gaussian((x - 2) / 2), -18, 22):.4f}")

# %%
figure, axes = plt.subplots(
    1, 2, figsize=(7, 2.5), layout="constrained", sharey=True, num="z, and x = 2 z + 2"
)
grids = torch.linspace(-4, 4, 400), torch.linspace(-6, 10, 400)
for axis, grid, p, name in zip(axes, grids, (gaussian, density), "zx", strict=True):
    inside = (grid - grid.mean()).abs() < (1 if name == "z" else 2)
    axis.plot(grid, p(grid))
    axis.fill_between(grid[inside], p(grid)[inside], alpha=0.4)
    axis.set(title=f"density of {name}", xlabel=name, xlim=(-6, 10), ylim=(0, 0.42))

# %% [markdown]
# The two filled areas are equal. Without the slope the "density" of x would have the area 2, and
# would be none.
#
# ## Why the absolute value
#
# A map may turn the line round: z = -x / 2 has the slope -1/2. Widths are still halved, and no
# area is negative, so the formula takes the absolute value of the slope. `InvertibleConv1x1` of
# one channel is a multiplication by a number.

# %%
turn = InvertibleConv1x1(1)
with torch.no_grad():
    turn.weight.fill_(-0.5)
x = torch.tensor([[[4.0]]])
z, log_slope = turn(x)
print(f"x = 4 goes to z = {z.item():.1f}; the absolute slope is {log_slope.exp().item():.1f}")
print("log of the slope itself:", torch.tensor(-0.5).log().item())

# %% [markdown]
# ## A curve
#
# If f is curved, its slope differs from point to point. The formula holds at each point with the
# slope there. A rational-quadratic spline is a curve that always rises; its parameters set the
# widths and the heights of its pieces, and the slopes where two pieces meet. They may be any
# numbers: a softmax and a softplus make positive ones of them, and zeros give the line z = x.
# This one has three pieces and is nearly flat in the middle.

# %%
spline = RationalQuadratic(n_bins=3, bound=4.0)
widths, heights, slopes = [0.0, 0.0, 0.0], [0.0, -1.5, 0.0], [-1.5, -1.5]
params = torch.tensor(widths + heights + slopes)


def curve(x):
    """z and log f'(x) of the numbers x (N,)."""
    signal = x[None, None]
    z, log_slope = spline.forward(signal, params[None, :, None].expand(-1, -1, len(x)))
    return z[0, 0], log_slope[0, 0]


def curved_density(x):
    """The density of x where z = curve(x) is Gaussian."""
    z, log_slope = curve(x)
    return gaussian(z) * log_slope.exp()


print(f"whole area: {area(curved_density, -8, 8):.4f}")
for point in (1.0, 2.0):
    z, log_slope = curve(torch.tensor([point]))
    print(f"x = {point:.0f}: z = {z.item():.2f}, slope {log_slope.exp().item():.2f}")

# %%
x = torch.linspace(-4, 4, 400)
figure, axes = plt.subplots(
    2, 2, figsize=(7, 5), layout="constrained", num="A curve turns one hill into two"
)
axes[0, 1].plot(x, curve(x)[0])
axes[0, 1].set(title="z = f(x)", ylabel="z")
axes[0, 0].plot(gaussian(x), x)
axes[0, 0].set(title="density of z", ylabel="z", xlim=(0.6, 0))
axes[1, 1].plot(x, curved_density(x))
axes[1, 1].set(title="density of x", xlabel="x")
axes[1, 0].axis("off")
# Edges of ten strips of the same probability, in z and in x.
edges = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.1, 0.9, 9))
for z in edges:
    nearest = x[(curve(x)[0] - z).abs().argmin()]
    axes[0, 1].plot([-4, nearest, nearest], [z, z, -4], color="gray", linewidth=0.6)
    axes[0, 0].axhline(z, color="gray", linewidth=0.6)
    axes[1, 1].axvline(nearest, color="gray", linewidth=0.6)
for axis in (axes[0, 0], axes[0, 1]):
    axis.set_ylim(-4, 4)
axes[0, 1].set_xlim(-4, 4)
axes[1, 1].set_xlim(-4, 4)

# %% [markdown]
# The gray lines cut ten strips that hold a tenth of the probability each. Where the curve is
# flat, a strip of z becomes a wide strip of x, and the density of x is low. Where it is steep,
# strips are narrow and the density is high. One hill has become two.
#
# ## Where the map folds back
#
# An absolute value is no bijection: two numbers have the same. Nothing can undo it, and
# `check_bijection` says so. It compares every promise of a bijection with what the map really
# does.


# %%
class Fold(Bijection):
    """z = |x|, and a wrong inverse: there is none."""

    context = (0, 0)

    def forward(self, x, cond=None):
        return x.abs(), torch.zeros(len(x), dtype=x.dtype)

    def inverse(self, z, cond=None):
        return z, torch.zeros(len(z), dtype=z.dtype)


try:
    check_bijection(Fold(), torch.tensor([[[-1.5, 0.5]]]))
except ContractError as error:
    print(error)

# %% [markdown]
# x = |z + 0.5| still has a density. Each of the two branches, z = x - 0.5 and z = -x - 0.5,
# brings its own area, and the areas add up. The second branch falls (its slope is -1), so this
# sum needs the absolute value too.

# %%
torch.manual_seed(0)
draws = (torch.randn(100_000) + 0.5).abs()
right, left = (lambda x: gaussian(x - 0.5)), (lambda x: gaussian(-x - 0.5))
print(f"draws between 0 and 1:      {(draws < 1).float().mean():.2f}")
print(f"area of both branches:      {area(right, 0, 1) + area(left, 0, 1):.2f}")
print(f"area with the slope's sign: {area(right, 0, 1) - area(left, 0, 1):.2f}")

figure, axis = plt.subplots(figsize=(6, 2.7), layout="constrained", num="Two branches add up")
x = torch.linspace(0, 4, 200)
axis.hist(draws.numpy(), bins=80, range=(0, 4), density=True, color="lightgray", label="draws")
axis.plot(x, right(x), "--", label="z = x - 0.5")
axis.plot(x, left(x), "--", label="z = -x - 0.5")
axis.plot(x, right(x) + left(x), label="their sum")
axis.set(title="density of x = |z + 0.5|", xlabel="x")
axis.legend()

# %% [markdown]
# Flows use bijections only. Then there is one branch, x can be turned back into z, and the
# likelihood is exact.
#
# ## Steps after one another
#
# The slope of a chain is the product of the slopes (the chain rule). Logarithms of slopes add up,
# so a flow of many steps adds one number for each. `Chain` does that.

# %%
both = Chain(stretch, turn)
x = torch.tensor([[[4.0]]])
first, log_slope_1 = stretch(x)
_, log_slope_2 = turn(first)
print(f"sum {(log_slope_1 + log_slope_2).item():.4f}, chain {both(x)[1].item():.4f}")

# %% [markdown]
# ## In one sentence
#
# The density of x is the density of z = f(x) times |f'(x)|, because every interval keeps its
# area.
#
# Next: [2. The Jacobian and its determinant](02_jacobian.md), the same in two dimensions.
