# %% [markdown]
# # 7. Speech
#
# **The question: what is z of a recording, and what happens to speech when we change it?**
#
# The flow is FrameGlow, the model that ships. It maps audio to z under a mel spectrogram, which
# says which words are spoken and how. We run it backwards step by step, look at z of real speech,
# and then change z: colder, between two recordings, and along a direction.
#
# Recordings are needed, and none are in the repository. This page was made with the validation
# clips of the corpus `kathleen` (CC0, github.com/rhasspy/dataset-voice-kathleen). Put a corpus
# with `wavs/` and `val.txt` in `data/kathleen`, or name its folder:
#
#     WAVEFLOW_RECORDINGS=FOLDER python docs/tutorial/build_pages.py 07_speech

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import waveflow
from waveflow.audio.dequantise import dequantise
from waveflow.audio.io import read_audio

folder = Path(os.environ.get("WAVEFLOW_RECORDINGS", "data/kathleen"))
vocoder = waveflow.load()
flow, rate = vocoder.flow, vocoder.sample_rate
FRAMES = 172  # two seconds
torch.set_grad_enabled(False)


def clip(name):
    """Two seconds (T,) from the first loud sample on, with the noise of half a 16-bit step."""
    (path,) = (folder / "wavs").glob(f"{name}.*")
    audio = dequantise(torch.from_numpy(read_audio(path, rate)[0]), 0)
    start = int((audio.abs() > 0.1 * audio.abs().max()).nonzero()[0])
    return audio[start : start + FRAMES * vocoder.hop_length]


names = (folder / "val.txt").read_text().split()
clips = [audio for audio in map(clip, names) if len(audio) == FRAMES * vocoder.hop_length]
mels = [vocoder.mel(audio)[:, :FRAMES] for audio in clips]
print(f"{len(clips)} clips of {len(clips[0]) / rate:.1f} s")
print(vocoder)


def log_mel(audio):
    """The mel (80, FRAMES) of a waveform of any size."""
    return vocoder.mel_spectrogram(audio)[:, :FRAMES]


def level(audio):
    """The level in dB."""
    return 20 * audio.square().mean().sqrt().log10().item()


def high_level(audio):
    """The level above 4 kHz in dB."""
    spectrum = torch.fft.rfft(audio)
    spectrum[: int(4000 / rate * len(audio))] = 0
    return level(torch.fft.irfft(spectrum, len(audio)))


def average_spectrum(audio):
    """Power (64,) in bands of 172 Hz up to the Nyquist frequency, in dB."""
    power = torch.fft.rfft(audio).abs().square()
    return 10 * torch.stack([band.mean() for band in power.tensor_split(64)]).log10()


def spectrogram(axis, audio, title):
    """Draws decibels over time and frequency, to 8 kHz."""
    window = torch.hann_window(512)
    size = torch.stft(audio, 512, 128, window=window, return_complex=True).abs()
    decibels = 20 * size.clamp_min(1e-5).log10()
    top = decibels.max()
    extent = (0, len(audio) / rate, 0, rate / 2000)
    axis.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        extent=extent,
        vmin=top - 70,
        vmax=top,
        cmap="magma",
    )
    axis.set(ylim=(0, 8), xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


# %% [markdown]
# ## There and back
#
# `encode` goes from audio to z, `decode` from z to audio. z has 256 channels and a position for
# each frame of the mel: as many numbers as the audio has samples.

# %%
audio, mel = clips[0], mels[0]
z = vocoder.encode(audio, mel)
back = vocoder.decode(z, mel)[0]
print("samples:", len(audio), " z:", tuple(z.shape))
print(f"largest error of the round trip below 1e-4: {(back - audio).abs().max().item() < 1e-4}")
print(f"log-likelihood: {vocoder.log_prob(audio, mel).item():.2f} nats per sample")

# %% [markdown]
# ## Noise becomes speech, step by step
#
# The bijection is a `Chain`, and a chain has parts. From audio to noise they are: a lapped
# transform of blocks of 256 samples into 256 frequency bands; the level of each band from the mel
# (the base); levels of bands from their neighbours; and four times a coupling and a 1x1
# convolution. Backwards, we undo the last ones first. After each stage we go straight through the
# lapped transform, and look at the waveform.

# %%
chain = flow.bijection
cond = flow.condition(mel[None])
noise = flow.noise(FRAMES, [0])


def heard(bands):
    """The waveform of frequency bands, through the lapped transform alone."""
    return chain[0].inverse(bands, cond)[0][0, 0]


print("steps of the chain:", len(chain))
stages = {"z": 14, "two flows undone": 10, "four flows undone": 6, "levels undone": 2, "audio": 1}
waves = {name: heard(chain[first:].inverse(noise, cond)[0]) for name, first in stages.items()}
waves["base alone"] = heard(chain[1].inverse(noise, cond)[0])

print("correlation of log-mels with the recording's:")
figure, axes = plt.subplots(
    1, 6, figsize=(8, 2), layout="constrained", num="Noise becomes speech; last, the base alone"
)
for axis, (name, wave) in zip(axes, waves.items(), strict=True):
    pair = torch.stack([log_mel(wave), mel]).flatten(1)
    print(f"{name:18s} {torch.corrcoef(pair)[0, 1].item():5.2f}")
    spectrogram(axis, wave, name)

# %% [markdown]
# The first four waveforms hardly follow the words: they are noise, and no band is far above the
# others. The base then gives each band the level that the mel asks for. Straight from z to the
# base, without the couplings, we get the last picture, and its levels are nearly right. So what
# do the couplings do?
#
# A voice is periodic. We take frames of 46 ms, correlate each with itself 2.5 to 10 ms later,
# keep the largest correlation, and average over the louder half of the frames.


# %%
def periodicity(audio):
    """Mean over loud frames of the largest autocorrelation at lags from 2.5 to 10 ms."""
    frames = audio.unfold(0, 1024, 256)
    frames = frames[frames.square().sum(1) > frames.square().sum(1).median()]
    lags = range(rate // 400, rate // 100)
    here, pairs = frames[:, : 1024 - lags[-1]], []
    for lag in lags:
        there = frames[:, lag : lag + here.shape[1]]
        pairs.append(torch.cosine_similarity(here, there, dim=1))
    return torch.stack(pairs).amax(0).mean().item()


for name, wave in (
    ("base alone", waves["base alone"]),
    ("all steps", waves["audio"]),
    ("recording", audio),
):
    print(f"periodicity, {name:10s} {periodicity(wave):.2f}")

# %% [markdown]
# The base sets the levels, and the couplings make a voice that is as periodic as the recording's.
#
# ## Is z of real speech Gaussian?
#
# Training asks for it. We encode all clips, each under its own mel, and compare the histogram of
# all z with the standard normal. A logarithmic scale shows the tails.

# %%
latents = [vocoder.encode(audio, mel) for audio, mel in zip(clips, mels, strict=True)]
values = torch.cat([z.flatten() for z in latents])
kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
normal = torch.distributions.Normal(0.0, 1.0)
print(f"values {len(values)}, mean {abs(values.mean().item()):.2f}, std {values.std().item():.2f}")
print(f"kurtosis {kurtosis.item():.2f}; a Gaussian has 3")

figure, axis = plt.subplots(
    figsize=(5.5, 2.6), layout="constrained", num="Histogram of z of recordings"
)
edges = torch.linspace(-8, 8, 161)
axis.hist(values.numpy(), bins=edges.numpy(), density=True, color="lightgray", label="recordings")
axis.plot(edges, normal.log_prob(edges).exp(), color="C3", label="standard normal")
axis.set(yscale="log", ylim=(1e-7, 1), xlabel="z", ylabel="density")
axis.legend()

# %% [markdown]
# Nearly: the shape is close to a Gaussian's, a little wider than it should be, and with heavier
# tails. These are clips that the model was not trained on, and now and then they do what it does
# not expect.
#
# ## Temperature
#
# A draw uses noise of the standard deviation sigma, its **temperature**. At 1 we draw from the
# density that was learned. At 0 there is no noise, and the flow makes one waveform of the mel
# alone. (`draw` leaves the flow's result as it is; `vocoder(mel)` would refine it towards its
# mel.)

# %%
sigmas = [0.0, 0.25, 0.5, 0.75, 1.0]
draws = {f"sigma {sigma:g}": vocoder.draw(mel, sigma=sigma, seed=0) for sigma in sigmas}
draws["recording"] = audio
figure, axes = plt.subplots(
    1, 6, figsize=(8, 2), layout="constrained", num="Sigma from 0 to 1; last, the recording"
)
print("              level   above 4 kHz   periodicity   nats per sample")
for axis, (name, draw) in zip(axes, draws.items(), strict=True):
    density = vocoder.log_prob(draw, mel).item()
    print(
        f"{name:12s} {level(draw):6.1f} {high_level(draw):13.1f} {periodicity(draw):13.2f}"
        f" {density:17.2f}"
    )
    spectrogram(axis, draw, name)

# %% [markdown]
# Levels are in dB. The whole level hardly changes: it is that of the voice's low harmonics, which
# the flow finds without noise. Above 4 kHz, where speech is mostly noise, cold draws are much too
# weak. Their likelihood is higher than that of the recording, since the density of a Gaussian is
# highest at its centre, where hardly any draw lies. So a high likelihood alone does not make a
# good draw. At sigma 1 both levels are close to those of the recording.
#
# ## Between two recordings
#
# We take z of two recordings and mix them, both under the mel of the first. There are two ways:
#
# - a straight line, (1 - a) z1 + a z2. In its middle the two noises partly cancel: a mixture of
#   two independent Gaussians has the standard deviation sqrt(0.5) there;
# - a circle, cos(a pi / 2) z1 + sin(a pi / 2) z2. The squares of its weights add up to 1, so the
#   mixture is as wide as its ends.

# %%
z1, z2 = latents[0], latents[1]
amounts = [0.0, 0.25, 0.5, 0.75, 1.0]
figure, axes = plt.subplots(
    1, 2, figsize=(7, 2.4), layout="constrained", num="From z1 (a = 0) to z2 (a = 1)"
)
print("way       a   std of z   level   log-mel distance   correlation with recording 1")
for way in ("line", "circle"):
    levels, likenesses = [], []
    for a in amounts:
        angle = torch.tensor(a * torch.pi / 2)
        mixed = torch.lerp(z1, z2, a) if way == "line" else angle.cos() * z1 + angle.sin() * z2
        wave = vocoder.decode(mixed, mel)[0]
        distance = (log_mel(wave) - mel).abs().mean().item()
        levels.append(level(wave))
        likenesses.append(torch.corrcoef(torch.stack([wave, audio]))[0, 1].item())
        print(
            f"{way:6s} {a:5.2f} {mixed.std().item():8.2f} {levels[-1]:9.1f} {distance:12.2f}"
            f" {likenesses[-1]:20.2f}"
        )
    axes[0].plot(amounts, levels, "o-", label=way)
    axes[1].plot(amounts, likenesses, "o-", label=way)
axes[0].set(title="level, dB", xlabel="a")
axes[1].set(title="correlation with recording 1", xlabel="a")
axes[0].legend()
fresh = (log_mel(draws["sigma 1"]) - mel).abs().mean().item()
print(f"log-mel distance of a fresh draw: {fresh:.2f}")

# %% [markdown]
# At a = 0 we have the first recording itself. At a = 1 the waveform is another one, and yet its
# mel is nearly as close to that of the first recording as the mel of a fresh draw. Nothing of the
# second recording's words has come over: here z is not the content. The mel says what is spoken;
# z says the rest, such as phases and noise. The straight line loses level in its middle, and the
# circle does not.
#
# ## A direction: louder, breathier
#
# In flows of images, people add a vector to z and a face smiles: the mean z of smiling faces
# minus the mean of others. What is such a direction in speech? We estimate two, from all clips
# but the first:
#
# - **louder**: the same recording at twice the amplitude, encoded under the mel of the original;
# - **breathier**: with noise added above 3 kHz that follows the recording's own spectrogram, as
#   breath follows the voice, encoded under the mel of the original.
#
# The first estimate is a vector: the mean of z' - z for each channel.


# %%
def louder(audio):
    return 2 * audio


def breathier(audio):
    """Adds noise above 3 kHz in proportion to the audio's own spectrogram."""
    settings = {"n_fft": 512, "hop_length": 128, "window": torch.hann_window(512)}
    spectrum = torch.stft(audio, **settings, return_complex=True)
    generator = torch.Generator().manual_seed(0)
    noise = (
        2 * spectrum.abs() * torch.randn(spectrum.shape, generator=generator, dtype=torch.complex64)
    )
    noise[: int(3000 / rate * 512)] = 0
    return audio + torch.istft(noise, **settings, length=len(audio))


changes = {"louder": louder, "breathier": breathier}


def encoded(change):
    """z (256, all frames) of all clips but the first, changed, under their own mels."""
    pairs = zip(clips[1:], mels[1:], strict=True)
    return torch.cat([vocoder.encode(change(audio), mel)[0] for audio, mel in pairs], 1)


before = torch.cat([z[0] for z in latents[1:]], 1)
after = {name: encoded(change) for name, change in changes.items()}
print("            length of the vector, of z's   level   above 4 kHz")
for name, changed in after.items():
    vector = (changed - before).mean(1, keepdim=True)
    length = vector.norm() / before.norm(dim=0).mean()
    wave = vocoder.decode(z1 + vector, mel)[0]
    print(
        f"{name:10s} {length.item():29.2f} {level(wave) - level(audio):+7.1f}"
        f" {high_level(wave) - high_level(audio):+13.1f}"
    )

# %% [markdown]
# The vector is short, and it does next to nothing. There is a reason: a waveform and its negative
# sound the same and are about equally likely, so z and -z are too, and means over them vanish. A
# vector that is added to all frames of z is a tone. Loudness and breath are no tones but
# **factors**: some directions of z become larger.
#
# So the second estimate is a matrix G, the gain along each direction of z: the symmetric matrix
# that turns the covariance of z before into that after. From a z we then go along (G - 1) z by
# some amount; at 1 we arrive at G z.


# %%
def root(matrix):
    """The square root of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def gain(before, after):
    """The symmetric matrix G such that G before has the covariance of after."""
    first, second = torch.cov(before.double()), torch.cov(after.double())
    half = root(first)
    inverse = torch.linalg.inv(half)
    return (inverse @ root(half @ second @ half) @ inverse).float()


kilohertz = (torch.arange(64) + 0.5) / 64 * rate / 2000
gains = {name: gain(before, changed) for name, changed in after.items()}
figure, axis = plt.subplots(
    figsize=(5.5, 2.5), layout="constrained", num="Gains along the directions of z"
)
for name, matrix in gains.items():
    axis.plot(torch.linalg.eigvalsh(matrix), label=name)
axis.set(xlabel="directions of z, in ascending order", ylabel="gain", ylim=(0, None))
axis.legend()

figure, axes = plt.subplots(
    1, 2, figsize=(7, 2.6), layout="constrained", num="Change of the average spectrum, dB"
)
colors = {-0.5: "C0", 0.0: "0.7", 0.5: "C2", 1.0: "C3", "real": "k"}
print("direction   amount   level   above 4 kHz   periodicity   nats per sample")
for axis, (name, change) in zip(axes, changes.items(), strict=True):
    direction = gains[name] @ z1 - z1
    for amount, color in colors.items():
        if amount == "real":
            wave = change(audio)
        else:
            wave = vocoder.decode(z1 + amount * direction, mel)[0]
        print(
            f"{name:10s} {amount:>7} {level(wave) - level(audio):+8.1f}"
            f" {high_level(wave) - high_level(audio):+12.1f} {periodicity(wave):14.2f}"
            f" {vocoder.log_prob(wave, mel).item():16.2f}"
        )
        difference = average_spectrum(wave) - average_spectrum(audio)
        style = "--" if amount == "real" else "-"
        axis.plot(kilohertz, difference, style, color=color, label=str(amount), linewidth=1)
    axis.set(title=name, xlabel="kHz", ylabel="dB", ylim=(-10, 12))
axes[1].legend(fontsize=7, loc="lower left")
torch.set_grad_enabled(True)

# %% [markdown]
# Changes of level are in dB, against the first recording. The lines "real" are the changes that
# the directions imitate, made on that recording itself, which took no part in the estimate.
#
# At the amount 1 both directions arrive near the real change: "louder" raises all of the
# spectrum, "breathier" only what lies above 3 kHz. Amounts between lie between, and -0.5 goes the
# other way. The likelihood falls as we go up: the mel still asks for the old level, and this z is
# an unlikely one. To make speech louder, one would of course change the mel.
#
# ## In one sentence
#
# z of speech is nearly Gaussian noise that fills in what the mel leaves open, and a direction in
# it is a gain, not a vector.
#
# Next: [8. Build your own flow](08_build_your_own.md).
