"""Any length, any batch: context of the layers, windows, streams, padded batches, memory."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from waveflow.audio.mel import MelConfig
from waveflow.checkpoint import ModelConfig, SynthesisConfig
from waveflow.distributions import draw_noise
from waveflow.engine import streaming
from waveflow.engine.streaming import window_context
from waveflow.engine.vocoder import Vocoder, VocoderWarning, load
from waveflow.errors import ConfigError, MelMismatchError
from waveflow.flow import State
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.frameglow.conditioner import FrameConditioner
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.nn.source import HarmonicSource

pytestmark = pytest.mark.filterwarnings("ignore:.*were clipped")

HOP, BANDS = 16, 8
# Below 1, where a conditioner makes features anew for its sigma.
SIGMA = 0.5
HOP_CENTRED = MelConfig(
    sample_rate=8000, n_fft=64, hop_length=HOP, win_length=64, n_mels=BANDS, f_max=4000.0
)
EDGE_CENTRED = HOP_CENTRED.model_copy(update={"padding": "center"})
FRAMEGLOW = FrameGlowConfig(
    n_levels=2,
    n_flows=2,
    hidden_channels=8,
    dilations=(1, 2),
    encoder_channels=8,
    encoder_layers=1,
    minimum_phase=True,
    noise_share=True,
)
WAVEGLOW = WaveGlowConfig(
    n_mels=BANDS,
    hop_length=HOP,
    n_flows=3,
    squeeze_factor=8,
    n_early_every=2,
    n_layers=3,
    hidden_channels=8,
    upsample_kernel=4 * HOP,
)
MODELS = {
    "frameglow": (FRAMEGLOW, HOP_CENTRED),
    "convnext": (FRAMEGLOW.model_copy(update={"network": "convnext"}), EDGE_CENTRED),
    "waveglow": (WAVEGLOW, EDGE_CENTRED),
    "repeated": (WAVEGLOW.model_copy(update={"conditioning": "repeated"}), HOP_CENTRED),
    "smallest": (
        WaveGlowConfig(
            n_mels=BANDS,
            hop_length=HOP,
            n_flows=1,
            squeeze_factor=HOP,
            n_layers=1,
            hidden_channels=2,
            conditioning="repeated",
        ),
        HOP_CENTRED,
    ),
}


@pytest.fixture(params=["frameglow", "convnext", "waveglow", "repeated"])
def vocoder(request: pytest.FixtureRequest) -> Vocoder:
    return build(request.param)


def build(name: str) -> Vocoder:
    """A vocoder with random weights, far from the identity, and quiet enough not to clip."""
    model, mel = MODELS[name]
    synthesis = SynthesisConfig(sigma=SIGMA, refine_steps=2, refine_power=1.3, refine_momentum=0.3)
    config = ModelConfig(model=model, mel=mel, synthesis=synthesis)
    torch.manual_seed(0)
    flow = build_flow(model, mel)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Vocoder(config, flow)


def random_mel(n_frames: int, n_items: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return -5 + torch.randn(n_items, BANDS, n_frames, generator=generator)


@torch.no_grad()
def whole(vocoder: Vocoder, mel: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Audio (T,) of a mel (1, M, F) without windows: the definition."""
    z = vocoder.flow.noise(mel.shape[2], [seed])
    audio = vocoder.refinement(
        vocoder.flow.decode(z, mel, sigma=vocoder.config.synthesis.sigma), mel, steps
    )
    return audio[0].clamp(-1, 1)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short mel needs many of them."""
    monkeypatch.setattr(streaming, "WINDOW_FRAMES", 64)


# --- context ---


@torch.no_grad()
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_context_is_that_of_a_change(vocoder: Vocoder, steps: int) -> None:
    """Nothing outside it moves a frame of audio, in float64; its outermost frames do."""
    flow = vocoder.flow.double()
    left, right = map(int, window_context(flow, vocoder.refinement, steps))
    n_frames = left + right + 21
    middle = left + 10
    mel = random_mel(n_frames).double()
    z = flow.noise(n_frames, [0]).double()
    positions = HOP // flow.channels
    has_state = flow.conditioner.random_state(1, torch.device("cpu")) is not None

    def audio(mel: Tensor, z: Tensor) -> Tensor:
        # The state depends on all frames before, but it is carried: here it is such that the
        # window around the middle frame always begins with the same one.
        zero = (torch.zeros(1, dtype=torch.float64), None) if has_state else None
        state = flow.conditioner.carry(mel, None, zero, middle - left)
        state = None if state is None else ((-state[0], None), None)
        out = vocoder.refinement(flow.decode(z, mel, None, state, SIGMA), mel, steps)
        return out[0, middle * HOP : (middle + 1) * HOP]

    def change(first: int, last: int) -> float:
        """By how much other frames of mel and noise move the middle frame of audio."""
        other_mel, other_z = mel.clone(), z.clone()
        other_mel[:, :, first:last] += 2
        other_z[:, :, first * positions : last * positions] += 2
        return float((audio(other_mel, other_z) - before).abs().max())

    before = audio(mel, z)
    # A phase is a sum of frames to the left, which rounds.
    noise = 1e-11 if has_state else 0.0
    assert change(0, middle - left) <= noise
    assert change(middle + right + 1, n_frames) == 0
    # Tight but for rounding to frames, for levels (which see only bins that the last coupling
    # left alone), and for the feet of the refinement's windows, which are too small to see.
    slack = 1 + steps + levels(vocoder)
    assert change(middle - left, middle - left + slack + 1) > noise
    assert change(middle + right - slack, middle + right + 1) > 0


def levels(vocoder: Vocoder) -> int:
    """Frames of a FrameGlow's levels: one each, and four of the two that hear the mel."""
    config = vocoder.config.model
    return config.n_levels + 7 if isinstance(config, FrameGlowConfig) else 0


def test_a_jacobian_agrees(vocoder: Vocoder) -> None:
    """By autograd, of the unrefined audio: zero outside the context, for z not at its ends."""
    flow = vocoder.flow.double()
    left, right = map(int, flow.context)
    n_frames, middle = left + right + 11, left + 5
    mel = random_mel(n_frames).double().requires_grad_()
    z = flow.noise(n_frames, [0]).double().requires_grad_()
    state = (torch.zeros(1, dtype=torch.float64), None)
    state = (state if isinstance(flow.conditioner, FrameConditioner) else state[0], None)
    audio = flow.decode(z, mel, None, state, SIGMA)
    weights = torch.randn(HOP, generator=torch.Generator().manual_seed(2)).double()
    (audio[0, middle * HOP : (middle + 1) * HOP] * weights).sum().backward()
    assert mel.grad is not None and z.grad is not None
    seen = mel.grad.abs().sum((0, 1)).nonzero()[:, 0]
    assert seen.min() >= middle - left and seen.max() <= middle + right
    seen = z.grad.abs().sum((0, 1)).unflatten(0, (n_frames, -1)).sum(1).nonzero()[:, 0]
    frames = left - int(flow.conditioner.context[0])
    assert seen.min() >= middle - frames and seen.max() <= middle + frames
    slack = 1 + levels(vocoder)
    assert seen.min() <= middle - frames + slack and seen.max() >= middle + frames - slack


def test_contexts_of_the_models_that_people_use() -> None:
    """By hand, in frames."""
    shipped = load()
    # Encoder and pitch head: 4 layers of 3 each; couplings: 3 x 7; levels: 2 x 4 that hear the
    # mel (lapped 1, STFT 2, neighbours 1) and 3; lapped: 1.
    assert shipped.flow.context == (12 + 12 + 21 + 8 + 3 + 1,) * 2
    # A frame reaches 3.5 frames over its edges in the first step, 3 more in each other step.
    assert [shipped.refinement.context_of_steps(n) for n in range(3)] == [(0, 0), (4, 4), (7, 7)]
    assert shipped.look_ahead() == 57 + 31 and shipped.look_ahead(refine=0) == 57
    config = WaveGlowConfig(hidden_channels=2)
    flow = build_flow(config, shipped.mel_config)
    # 12 networks of 255 groups each way, 32 groups to a frame; 3 more frames by the upsampler.
    assert flow.context == (96 + 3, 96)


# --- noise and phase ---


def test_noise_is_drawn_in_pieces() -> None:
    together = draw_noise(300, 4, [7, 8])
    cuts = [0, 1, 63, 64, 65, 200, 300]
    pieces = [draw_noise(b - a, 4, [7, 8], a) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces, 1), together)


def test_the_phase_is_carried() -> None:
    """Hours in, a window's pulses are those of the whole, once its F0 is."""
    source, anchor = HarmonicSource(8000, 64), 3
    f0 = 200 + 80 * torch.sin(torch.arange(90) / 5).double()[None]
    pulses, cycles = source(f0), source.cycles(f0)
    cut = 40
    start = 12345 + cycles[:, : cut + anchor].sum(1)
    window = f0[:, cut:].clone()
    window[:, : anchor - 1] = 100.0
    part = source(window, start, anchor)[:, anchor * 64 :]
    expected = pulses[:, (cut + anchor) * 64 :]
    torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_the_source_is_the_same_minutes_in() -> None:
    """Beyond 2^23 samples, where an interpolation that counts in float32 slips."""
    source = HarmonicSource(8000, 128)
    f0 = 200 + 80 * torch.sin(torch.arange(70000.0))[None]
    late = source.cycles(f0)[:, -50:-1]
    torch.testing.assert_close(late, source.cycles(f0[:, -60:])[:, -50:-1], rtol=0, atol=1e-12)


# --- windows ---


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("steps", [0, 2])
def test_windows_are_the_whole(vocoder: Vocoder, steps: int) -> None:
    _, right = window_context(vocoder.flow, vocoder.refinement, steps)
    for n_frames in (1, 63, 64 + right, 65 + right, 400):
        mel = random_mel(n_frames)
        expected = whole(vocoder, mel, steps)
        torch.testing.assert_close(vocoder(mel[0], refine=steps), expected, rtol=0, atol=1e-5)
    draw = vocoder.draw(mel[0])
    torch.testing.assert_close(draw.clamp(-1, 1), whole(vocoder, mel, 0), rtol=0, atol=1e-5)


def test_windows_of_a_long_mel_are_used() -> None:
    plain = build("waveglow")
    seen = []

    def decoder(z: Tensor, mel: Tensor, *rest: State) -> Tensor:
        seen.append(mel.shape[2])
        return plain.flow.decode(z, mel, *rest)

    vocoder = Vocoder(plain.config, plain.flow, lambda _: decoder)
    vocoder(random_mel(3 * streaming.WINDOW_FRAMES)[0])
    left, right = window_context(vocoder.flow, vocoder.refinement, 2)
    assert len(seen) >= 3
    # All of the context and nothing else.
    assert max(seen) == streaming.WINDOW_FRAMES + left + right
    # A call of usual length has no overhead.
    seen.clear()
    vocoder(random_mel(streaming.WINDOW_FRAMES)[0])
    assert seen == [streaming.WINDOW_FRAMES]


def test_every_length_is_hop_times_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lengths through four windows and their edges; some lengths of a FrameGlow."""
    monkeypatch.setattr(streaming, "WINDOW_FRAMES", 40)
    for name, lengths in (("smallest", range(1, 171)), ("frameglow", (1, 2, 39, 40, 41, 99, 170))):
        vocoder = build(name)
        mel = random_mel(170)[0]
        for n_frames in lengths:
            audio = vocoder(mel[:, :n_frames], refine=0)
            assert audio.shape == (HOP * n_frames,)
            assert torch.isfinite(audio).all()


def test_the_shipped_model_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    vocoder = load()
    monkeypatch.setattr(streaming, "WINDOW_FRAMES", 150)
    mel = shipped_mel(vocoder, 500)
    for n_frames in (1, 2, 3, 77, 500):
        expected = whole(vocoder, mel[None, :, :n_frames], vocoder.refine_steps)
        audio = vocoder(mel[:, :n_frames])
        assert audio.shape == (256 * n_frames,)
        torch.testing.assert_close(audio, expected, rtol=0, atol=1e-5)


def shipped_mel(vocoder: Vocoder, n_frames: int) -> Tensor:
    mel = vocoder.example_mel()
    assert mel is not None
    return mel.repeat(1, -(-n_frames // mel.shape[1]))[:, :n_frames]


# --- streams ---


def cut(mel: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Pieces of a mel (M, F); the sizes in turn, again and again."""
    begin, turn = 0, 0
    while begin < mel.shape[1]:
        size = sizes[turn % len(sizes)]
        yield mel[:, begin : begin + size]
        begin, turn = begin + size, turn + 1


@pytest.mark.parametrize(
    ("sizes", "least_frames"),
    [([1], 20), ([1, 2, 50], 7), ([37], None), ([1000], None), ([1000], 1000), ([100, 1], 64)],
)
def test_a_stream_is_the_whole(vocoder: Vocoder, sizes: list[int], least_frames: int) -> None:
    mel = random_mel(160)
    expected = whole(vocoder, mel, 2, seed=5)
    pieces = list(vocoder.stream(cut(mel[0], sizes), seed=5, least_frames=least_frames))
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-5)


def test_a_stream_of_the_smallest_steps(vocoder: Vocoder) -> None:
    """Each piece of mel gives its piece of audio, `look_ahead` later."""
    mel = random_mel(int(vocoder.look_ahead()) + 12)
    pieces = list(vocoder.stream(cut(mel[0], [1]), least_frames=1))
    assert [len(piece) for piece in pieces[:-1]] == [HOP] * 12
    torch.testing.assert_close(torch.cat(pieces), whole(vocoder, mel, 2), rtol=0, atol=1e-5)


def test_with_less_look_ahead_audio_comes_sooner_and_only_its_end_differs(
    vocoder: Vocoder,
) -> None:
    seen = int(vocoder.look_ahead())
    mel = random_mel(seen + 40)
    seconds = 3.5 * HOP / vocoder.sample_rate
    given, first = 0, 0

    def mels() -> Iterator[Tensor]:
        nonlocal given
        for piece in cut(mel[0], [1]):
            given += 1
            yield piece

    pieces = []
    for piece in vocoder.stream(mels(), least_frames=20, look_ahead=seconds):
        first = first or given
        pieces.append(piece)
    assert first == 20 + 3
    assert sum(map(len, pieces)) == mel.shape[2] * HOP
    expected = whole(vocoder, mel, 2)
    # A stream that waits for all that the model sees is the whole again.
    enough = list(
        vocoder.stream(cut(mel[0], [1]), look_ahead=(seen + 1) * HOP / vocoder.sample_rate)
    )
    torch.testing.assert_close(torch.cat(enough), expected, rtol=0, atol=1e-5)
    joined = torch.cat(pieces)
    if seen > 20 + 3:
        assert not torch.allclose(joined, expected, rtol=0, atol=1e-5)
    # The last piece has all that there is.
    last = len(pieces[-1])
    torch.testing.assert_close(joined[-last:], expected[-last:], rtol=0, atol=1e-5)


def test_audio_comes_as_soon_as_it_is_final() -> None:
    vocoder = build("frameglow")
    look_ahead = int(vocoder.look_ahead())
    given = 0

    def mels() -> Iterator[Tensor]:
        nonlocal given
        for piece in cut(random_mel(6 * look_ahead)[0], [5]):
            given += piece.shape[1]
            yield piece

    made = 0
    for piece in vocoder.stream(mels(), least_frames=10):
        made += len(piece) // HOP
        waiting = given - made
        # What is given but not made: the context behind, and too few frames for a step.
        assert waiting <= look_ahead + 10 + 5
    assert made == 6 * look_ahead


def test_the_users_own_gradients_are_left_alone() -> None:
    """The mels are made in the caller's mode, even while the stream asks for them."""
    vocoder = build("waveglow")

    def mels() -> Iterator[Tensor]:
        for piece in cut(random_mel(60)[0], [20]):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            yield piece.requires_grad_()

    for piece in vocoder.stream(mels()):
        assert not piece.requires_grad
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_what_a_stream_refuses() -> None:
    vocoder = build("frameglow")
    mel = random_mel(200)[0]
    with pytest.raises(MelMismatchError, match="stream is empty"):
        list(vocoder.stream([]))
    with pytest.raises(MelMismatchError, match="mel is empty"):
        list(vocoder.stream([mel, mel[:, :0]]))
    with pytest.raises(MelMismatchError, match="4 bands, the model takes 8"):
        list(vocoder.stream([mel[:4]]))
    with pytest.raises(MelMismatchError, match=r"one mel \(M, f\), not \(2, 8, 200\)"):
        list(vocoder.stream([torch.stack([mel, mel])]))
    # What is out of range is said at once, not when the first mel comes.
    for options in (
        {"sigma": -1.0},
        {"refine": 65},
        {"least_frames": 0},
        {"look_ahead": -0.1},
        {"seed": [1, 2]},
    ):
        with pytest.raises(ConfigError):
            vocoder.stream([mel], **options)


def test_nan_in_mid_stream_is_refused_before_it_is_heard() -> None:
    vocoder = build("frameglow")
    mel = random_mel(400)[0]
    bad = mel.clone()
    bad[3, 399] = torch.nan
    stream = vocoder.stream([mel, bad])
    heard = []
    with pytest.raises(MelMismatchError, match="NaN"):
        heard.extend(stream)
    made = sum(len(piece) for piece in heard)
    assert 0 < made <= 400 * HOP
    torch.testing.assert_close(
        torch.cat(heard), whole(vocoder, mel[None], 2)[:made], rtol=0, atol=1e-5
    )


def test_clipping_in_a_stream_is_warned_of_once_where_it_is_read() -> None:
    vocoder = build("frameglow")
    loud = random_mel(300)[0] + 9
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pieces = list(vocoder.stream(cut(loud, [50])))
    assert len(pieces) > 2 and torch.cat(pieces).abs().max() == 1
    assert [(w.category, w.filename) for w in caught] == [(VocoderWarning, __file__)]


# --- padded batches ---


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_padded_item_gets_what_it_gets_alone(vocoder: Vocoder, steps: int) -> None:
    """Whatever fills its padding."""
    lengths = [1, 40, 300, 2, 150, 64]
    fillings = [torch.nan, 100.0, torch.inf, 0.0, torch.nan, -torch.inf]
    # All end before the batch does: a window holds nothing but padding.
    mel = random_mel(400, len(lengths))
    for item, (n_frames, filling) in enumerate(zip(lengths, fillings, strict=True)):
        mel[item, :, n_frames:] = filling
    seeds = list(range(len(lengths)))
    audio, n_samples = vocoder(mel, seed=seeds, refine=steps, lengths=torch.tensor(lengths))
    assert n_samples.tolist() == [HOP * n for n in lengths]
    assert audio.shape == (len(lengths), 400 * HOP)
    for item, n_frames in enumerate(lengths):
        own = mel[item : item + 1, :, :n_frames]
        expected = whole(vocoder, own, steps, seed=item)
        alone = vocoder(own[0], seed=item, refine=steps)
        n = n_frames * HOP
        torch.testing.assert_close(audio[item, :n], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(audio[item, :n], alone, rtol=0, atol=1e-5)
        assert not audio[item, n:].any()


def test_a_padded_batch_of_the_shipped_model() -> None:
    vocoder = load()
    mel = shipped_mel(vocoder, 120)
    batch = torch.stack([mel, mel.flip(1), mel])
    batch[1, :, 50:], batch[2, :, 1:] = torch.nan, torch.nan
    audio, n_samples = vocoder(batch, lengths=[120, 50, 1])
    assert n_samples.tolist() == [120 * 256, 50 * 256, 256]
    for item, n in enumerate([120, 50, 1]):
        alone = vocoder(batch[item, :, :n])
        torch.testing.assert_close(audio[item, : n * 256], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 0], r"lengths \[3, 0\] are out of range: this mel has 5 frames"),
        ([6, 2], "out of range"),
        ([5], r"integers \(B,\) for a batch"),
        ([5.0, 2.0], "integers"),
        ([[5], [2]], "integers"),
    ],
)
def test_wrong_lengths(lengths: list, message: str) -> None:
    vocoder, mel = build("waveglow"), random_mel(5, 2)
    with pytest.raises(MelMismatchError, match=message):
        vocoder(mel, lengths=lengths)
    with pytest.raises(MelMismatchError, match="batch"):
        vocoder(mel[0], lengths=[5])


# --- memory ---

THE_SHIPPED = "vocoder = waveflow.load()"
A_WAVEGLOW = """
from waveflow.audio.mel import MEL_PRESETS
from waveflow.checkpoint import ModelConfig
from waveflow.engine.vocoder import Vocoder
from waveflow.models.waveglow import WaveGlowConfig, waveglow
sizes = WaveGlowConfig(n_flows=1, hidden_channels=4, n_layers=1)
vocoder = Vocoder(ModelConfig(model=sizes, mel=MEL_PRESETS["nvidia"]), waveglow(sizes))
"""
MEASURE = """
import resource, torch, waveflow
torch.set_num_threads(1)
{vocoder}
example = waveflow.load().example_mel()
for n_frames in {lengths}:
    mel = example.repeat(1, -(-n_frames // example.shape[1]))[:, :n_frames].contiguous()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    audio = vocoder(mel)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert torch.isfinite(audio).all()
    print((after - before) * 1024, audio.numel() * 4)
"""


def growth(lengths: list[int], vocoder: str = THE_SHIPPED) -> list[int]:
    """Bytes by which the peak grows with each of some lengths in turn, beyond the audio itself."""
    code = MEASURE.format(lengths=[50, *lengths], vocoder=vocoder)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, *lines = run.stdout.splitlines()
    return [int(peak) - int(audio) for peak, audio in map(str.split, lines)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in kilobytes")
def test_memory_is_flat() -> None:
    """After 24 seconds in windows of 12, 60 seconds need no more; whole, the condition alone of
    36 more seconds is 0.25 GB."""
    _, more = growth([2 * 1024, 5 * 1024], A_WAVEGLOW)
    assert more < 40e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in kilobytes")
def test_an_hour_within_a_gigabyte() -> None:
    an_hour = 3600 * 22050 // 256
    some, more = growth([an_hour // 10, an_hour])
    assert some + more + an_hour * 256 * 4 < 1e9
    # And flat: the rest is no more than for a tenth of it.
    assert more < 50e6
