# %% [markdown]
# # 6. MAF against IAF
#
# **The question: an autoregressive step is fast in one direction and slow in the other. Which?**
#
# The step is z_i = x_i exp(s_i) + t_i, where s_i and t_i are functions of x_1 ... x_(i-1).
#
# - From x to z: all x are known, so all s and t come from **one pass** of the network, by MADE's
#   masks (page 5).
# - From z to x: x_1 is needed for the parameters of x_2, these two for those of x_3, and so on.
#   **One pass for each element**.
#
# A masked autoregressive flow (MAF, Papamakarios and others, 2017) uses the step as it stands. An
# inverse autoregressive flow (IAF, Kingma and others, 2016) turns it round.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from waveflow import check_bijection
from waveflow.bijections import Affine, Inverse, OverChannels
from waveflow.nn.made import MADE

torch.manual_seed(0)


class CountsPasses(nn.Module):
    """A network that counts how often it runs."""

    context = (0, 0)

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.n_passes = 0

    def forward(self, x, features=None, mask=None):
        self.n_passes += 1
        return self.network(x, features, mask)


def autoregressive(channels):
    """A step with random weights, and its network."""
    made = MADE(channels, 0, 4 * channels, 2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5 / channels**0.5)
    counter = CountsPasses(made)
    return OverChannels(counter, Affine(bound=1.0), channels), counter


def passes(run, counter):
    """How often the network ran."""
    before = counter.n_passes
    with torch.no_grad():
        run()
    return counter.n_passes - before


# %% [markdown]
# ## Count the passes
#
# `forward` goes from data to noise. A **density** needs this direction, and so does training by
# likelihood. A **draw** needs `inverse`, from noise to data. IAF is `Inverse(MAF)`: the two
# directions change places.

# %%
CHANNELS = 16
maf, counter = autoregressive(CHANNELS)
iaf = Inverse(maf)
x = torch.randn(1, CHANNELS, 1)

print("network passes for 16 elements:")
print("      density   draw")
for name, flow in (("MAF", maf), ("IAF", iaf)):
    density = passes(lambda f=flow: f(x), counter)
    draw = passes(lambda f=flow: f.inverse(x), counter)
    print(f"{name}  {density:8d} {draw:6d}")

# %% [markdown]
# So MAF is trained fast and draws slowly; IAF draws fast, and the density of data that it has not
# drawn itself is slow. The passes of the slow direction grow with the length, however fast the
# computer is:

# %%
sizes = [2, 4, 8, 16, 32, 64]
counts = {"one pass": [], "the other way": []}
for size in sizes:
    step, step_counter = autoregressive(size)
    x = torch.randn(1, size, 1)
    counts["one pass"].append(passes(lambda s=step, x=x: s(x), step_counter))
    counts["the other way"].append(passes(lambda s=step, x=x: s.inverse(x), step_counter))
print("elements:", sizes)
for name, values in counts.items():
    print(f"{name}:", values)

figure, axis = plt.subplots(figsize=(5, 2.7), layout="constrained", num="Passes of the network")
axis.plot(sizes, counts["one pass"], "o-", label="MAF: density. IAF: draw.")
axis.plot(sizes, counts["the other way"], "o-", label="MAF: draw. IAF: density.")
axis.set(xlabel="elements", ylabel="network passes", xscale="log", yscale="log")
axis.set_xticks(sizes, sizes)
axis.set_yticks([1, *sizes], [1, *sizes])
axis.minorticks_off()
axis.legend()

# %% [markdown]
# A second of speech has 22,050 samples here. A WaveNet, which is such a step over time, needs as
# many passes to draw it.
#
# ## They are the same map
#
# Nothing is lost or added by turning a step round. Its two directions undo each other, and their
# log-determinants are opposite. IAF's `inverse` is MAF's `forward`, so these two agree.

# %%
x = torch.randn(5, CHANNELS, 1)
with torch.no_grad():
    z, log_det = maf(x)
    same_z, inverse_log_det = iaf.inverse(x)
    back, _ = maf.inverse(z)
print("IAF's draw is MAF's density pass:", torch.equal(z, same_z))
print("log-determinants are equal:", torch.equal(log_det, inverse_log_det))
print(f"round trip: error below 1e-5: {(back - x).abs().max().item() < 1e-5}")
for flow in (maf, iaf):
    report = check_bijection(flow, torch.randn(2, CHANNELS, 1))
    print(f"{type(flow).__name__}: errors below 1e-9: {max(report[:2]) < 1e-9}")

# %% [markdown]
# But a MAF and an IAF are different **models**. In a MAF the parameters of an element are
# functions of earlier data; in an IAF they are functions of earlier noise. Which fits better
# depends on the data.
#
# ## The slow direction without waste
#
# For element i, a whole pass also computes all the other elements and throws them away. MADE's
# hidden units are sorted by degree, so each needs to be computed only once, when all that it sees
# is known. `MADE.steps` does that, and `OverChannels` uses it where a network has it. The result
# is the same; the work is that of about one pass, cut into as many small steps as there are
# elements.

# %%
quick = OverChannels(counter.network, Affine(bound=1.0), CHANNELS)
whole_passes = []
counter.network.register_forward_hook(lambda *_: whole_passes.append(1))
with torch.no_grad():
    slowly = maf.inverse(z)[0]
    print("whole passes of the network before:", len(whole_passes))
    whole_passes.clear()
    quickly = quick.inverse(z)[0]
print("whole passes of the network now:", len(whole_passes))
print(f"largest difference below 1e-6: {(slowly - quickly).abs().max().item() < 1e-6}")

# %% [markdown]
# The steps still wait for each other, so a processor with many cores stays idle.
#
# ## What follows from it
#
# | | density and training | draw | used as |
# |---|---|---|---|
# | MAF, WaveNet | one pass | element by element | a density model |
# | IAF | element by element | one pass | a posterior in a VAE; the student of a WaveNet |
# | couplings (NICE, RealNVP, Glow, WaveGlow) | one pass | one pass | both, with weaker steps |
#
# An IAF in a VAE asks only for the density of its own draws. It has just made them from z, so it
# needs no slow pass. The student of Parallel WaveNet is an IAF that learns from a WaveNet in the
# same way: it draws in one pass, and the teacher gives the density of the draw in one pass.
#
# A coupling is an autoregressive step with two elements only, of which the first, the passive half,
# stays as it is. So both directions take one pass, and a flow needs more steps for the same work.
#
# ## In one sentence
#
# The direction in which the network sees what is given takes one pass: for MAF from data to
# noise, for IAF from noise to data.
#
# Next: [7. Speech](07_speech.md): a flow that speaks.
