# %% [markdown]
# # 3. Two moons
#
# **The question: can a flow learn a density that is nothing like a Gaussian, and which flow does
# it best?**
#
# Two half circles of points, with some noise. Four flows learn their density by likelihood: a
# linear one, NICE, RealNVP and MAF.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.autograd.functional import jacobian

from waveflow import Flow
from waveflow.bijections import (
    ActNorm,
    Additive,
    Affine,
    BatchNorm,
    Chain,
    Coupling,
    EvenOdd,
    Halves,
    InvertibleConv1x1,
    OverChannels,
    Reverse,
    Squeeze,
)
from waveflow.nn.made import MADE

NOISE = 0.08


def moon(angle, upper):
    """The points at these angles of the upper and of the lower moon, (..., 2)."""
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], -1)


def two_moons(n, seed):
    """n points of the moons with noise, (n, 2), and which of them are of the upper moon."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    return moon(angle, upper) + NOISE * torch.randn(n, 2, generator=generator), upper


train, _ = two_moons(4000, seed=0)
test, upper = two_moons(4000, seed=1)

# %% [markdown]
# ## Four flows
#
# A point is audio of two samples; `Squeeze(2)` makes it two channels of one position. Each flow
# is a list of bijections. They differ in what one step does to the two numbers:
#
# | flow | a step | paper |
# |---|---|---|
# | linear | z = W x + b | |
# | NICE | z2 = x2 + t(x1); a scaling at the end | Dinh and others, 2015 |
# | RealNVP | z2 = x2 exp(s(x1)) + t(x1); batch normalisation | Dinh and others, 2017 |
# | MAF | z1 = x1 exp(s) + t; z2 = x2 exp(s(x1)) + t(x1) | Papamakarios and others, 2017 |
#
# NICE's steps keep areas, since their Jacobian has ones on its diagonal. `ActNorm` at its end is
# the scaling, which sets how large the moons are.

# %%
torch.manual_seed(0)
N_STEPS = 6


def network(n_params):
    """From the passive number to the parameters of the active one."""
    layers = [nn.Conv1d(1, 48, 1), nn.Tanh(), nn.Conv1d(48, 48, 1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv1d(48, n_params, 1))


def nice():
    for k in range(N_STEPS):
        yield Coupling(network(1), Additive(), Halves(swap=k % 2 == 1))
    yield ActNorm(2)


def realnvp():
    for k in range(N_STEPS):
        yield Coupling(network(2), Affine(bound=2.0), Halves(swap=k % 2 == 1))
        yield BatchNorm(2)


def maf():
    for _ in range(N_STEPS):
        yield OverChannels(MADE(2, 0, 64, Affine.n_params), Affine(bound=2.0), 2)
        yield ActNorm(2)
        yield Reverse(2)


flows = {
    "linear": Flow(Chain(Squeeze(2), ActNorm(2), InvertibleConv1x1(2)), channels=2),
    "NICE": Flow(Chain(Squeeze(2), *nice()), channels=2),
    "RealNVP": Flow(Chain(Squeeze(2), *realnvp()), channels=2),
    "MAF": Flow(Chain(Squeeze(2), *maf()), channels=2),
}
print(flows["NICE"].bijection[1])

# %% [markdown]
# ## Training
#
# The loss is the negative log-likelihood, and nothing else. `flow(points)` is the log-likelihood
# per sample, so that of a point is twice as much. The figures are of points that no flow has
# seen.

# %%
N_UPDATES, BATCH = 400, 256


def fit(flow):
    """Trains a flow on the moons."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N_UPDATES)
    flow.train()
    for _ in range(N_UPDATES):
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        loss = -flow(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    flow.eval()


for name, flow in flows.items():
    n_parameters = sum(parameter.numel() for parameter in flow.parameters())
    fit(flow)
    with torch.no_grad():
        print(f"{name:8s} {n_parameters:6d} parameters {2 * flow(test).mean():6.2f} nats per point")

# %% [markdown]
# How good can it become? Here we know the true density: the mean of Gaussians around all points of
# both moons. On average over new points no density has a higher likelihood.

# %%
angles = torch.pi * (torch.arange(500) + 0.5) / 500
centres = torch.cat([moon(angles, torch.tensor(is_upper)) for is_upper in (True, False)])
squares = torch.cdist(test, centres).square()
log_terms = -squares / (2 * NOISE**2) - torch.tensor(2 * torch.pi * NOISE**2).log()
truth = (log_terms.logsumexp(1) - torch.tensor(1000.0).log()).mean()
print(f"the true density: {truth:.2f} nats per point")

# %%
grid_x, grid_y = torch.linspace(-1.8, 2.8, 150), torch.linspace(-1.3, 1.8, 110)
grid = torch.cartesian_prod(grid_x, grid_y)
figure, axes = plt.subplots(
    3, 4, figsize=(8, 5.4), layout="constrained", num="Densities, draws and z of four flows"
)
for column, (name, flow) in enumerate(flows.items()):
    with torch.no_grad():
        density = (2 * flow(grid)).exp().reshape(150, 110)
        draws = flow.sample(n_items=1000)
        z = flow.encode(test[:1000])[..., 0]
    axes[0, column].imshow(
        density.T.sqrt(), origin="lower", extent=(-1.8, 2.8, -1.3, 1.8), aspect="auto"
    )
    axes[1, column].scatter(*draws.T, s=1)
    axes[1, column].set(xlim=(-1.8, 2.8), ylim=(-1.3, 1.8))
    # Coloured by the moon, which no flow was told.
    axes[2, column].scatter(*z.T, s=1, c=upper[:1000], cmap="coolwarm")
    axes[2, column].set(xlim=(-4, 4), ylim=(-4, 4))
    axes[0, column].set_title(name)
for row, name in enumerate(("density", "draws", "z of data")):
    axes[row, 0].set_ylabel(name)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# The linear flow can only draw an ellipse. The others bend it. In the last row the flows run the
# other way: the more Gaussian the cloud, the better the flow. Where two moons must become one
# cloud, a thin bridge stays between them: a continuous map cannot tear a hill in two.
#
# How well do draws fit? We measure the distance from each draw to the nearest of 4,000 points of
# the training data, and compare it with that of new data.


# %%
def distance(points):
    """The 90th percentile of distances to the training data."""
    return torch.cdist(points, train).amin(1).quantile(0.9).item()


print(f"{'new data':12s} {distance(test[:1000]):.3f}")
for name, flow in flows.items():
    with torch.no_grad():
        print(f"{name:12s} {distance(flow.sample(n_items=1000)):.3f}")

# %% [markdown]
# ## The Jacobian as a picture
#
# With two channels a Jacobian has four entries. With eight it becomes a picture, which shows the
# difference between the three kinds of steps. White is zero.


# %%
def step_of(kind):
    """A step of 8 channels with random weights."""
    if kind == "MAF":
        step = OverChannels(MADE(8, 0, 64, 2), Affine(bound=1.0), 8)
    else:
        map = Additive() if kind == "NICE" else Affine(bound=1.0)
        inner = nn.Sequential(nn.Conv1d(4, 32, 1), nn.Tanh(), nn.Conv1d(32, 4 * map.n_params, 1))
        step = Coupling(inner, map, EvenOdd() if kind == "RealNVP, even and odd" else Halves())
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.normal_(0, 0.4)
    return step


kinds = ["NICE", "RealNVP", "RealNVP, even and odd", "MAF"]
figure, axes = plt.subplots(
    1, 4, figsize=(8, 2.4), layout="constrained", num="Jacobians d z / d x of steps of 8 channels"
)
for axis, kind in zip(axes, kinds, strict=True):
    step, x = step_of(kind), torch.randn(8, 1)
    table = jacobian(lambda v, s=step: s(v[None])[0][0], x)[:, 0, :, 0]
    log_det = step(x[None])[1].item()
    diagonal = table.diagonal().log().sum().item()
    print(f"{kind:22s} log_det {log_det:7.4f}, sum of the diagonal's logs {diagonal:7.4f}")
    axis.imshow(table.abs().sqrt(), cmap="Blues", vmin=0)
    axis.set(title=kind, xticks=[], yticks=[])
    axis.title.set_fontsize(9)

# %% [markdown]
# In all of them the determinant is the product of the diagonal. NICE has ones there, so its
# log-determinant is 0. RealNVP has ones in the passive half alone. MAF maps every channel, and
# every channel sees all before it: its step does most, and its inverse is slow, as page 6 shows.
#
# ## In one sentence
#
# Flows that bend a Gaussian step by step learn any such shape by likelihood alone; the freer the
# step, the better the likelihood for the same number of steps.
#
# Next: [4. The invertible 1x1 convolution](04_conv1x1.md).
