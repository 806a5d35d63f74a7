"""What `waveflow bench` can measure: trained models, untrained sizes, peers, and paths to run them.

A *path* is a way to run a model's weights; the paths of one model differ in speed and rounding
alone. "published" is the published code's way (weight norm on), "plain" the fastest way without
an engine (weight norm folded, eager, float32), which all others are compared with.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.bench.peers import Peer, Vocos, griffin_lim_peer
from waveflow.checkpoint import ModelConfig, load_checkpoint
from waveflow.engine.contract import Decoder
from waveflow.engine.cost import COUNTED_FRAMES, PLAIN_LEVEL, macs_per_frame, macs_per_second, tiled
from waveflow.engine.decoder import Precision, make_decoder
from waveflow.engine.fast.packed import with_packed_linears
from waveflow.engine.vocoder import Vocoder, example_mel
from waveflow.errors import CheckpointError
from waveflow.flow import Flow
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig, waveglow
from waveflow.nn.wavenet import WaveNet, fold_weight_norm
from waveflow.pretrained import DEFAULT_MODEL, list_models, model_folder

CALIBRATION_FRAMES = 64
VOCOS, GRIFFIN_LIM = "vocos", "griffin-lim"
PEERS = (VOCOS, GRIFFIN_LIM)
PEER_MEL = MEL_PRESETS["hifigan"]


def _squeezewave(squeeze_factor: int, hidden_channels: int) -> WaveGlowConfig:
    """The sizes of SqueezeWave (Zhai et al. 2020, table 1) in WaveGlow's own layers."""
    return WaveGlowConfig(
        squeeze_factor=squeeze_factor,
        hidden_channels=hidden_channels,
        n_early_every=2,
        n_early_size=16,
        conditioning="repeated",
    )


UNTRAINED = {
    "waveglow-256": WaveGlowConfig(),
    "waveglow-64": WaveGlowConfig(hidden_channels=64),
    "squeezewave-128-256": _squeezewave(128, 256),
    "squeezewave-128-128": _squeezewave(128, 128),
    "squeezewave-256-256": _squeezewave(256, 256),
    "squeezewave-256-128": _squeezewave(256, 128),
}
DEFAULT_SUBJECTS = (DEFAULT_MODEL, "waveglow-256")

# Standard deviation that random shifts and log-scales get, about that of a trained coupling.
SPREAD = 0.3
SEED = 0


class RunPath(NamedTuple):
    """A way to run a model."""

    kind: Literal["published", "plain", "engine", "compiled"]
    precision: Precision = "float32"

    @property
    def label(self) -> str:
        """For people: the engine's paths by their precision, the others by their name."""
        return f"{self.kind} {self.precision}" if self.kind in ("engine", "compiled") else self.kind


PLAIN = RunPath("plain")


class System(Protocol):
    """A model on one path."""

    def __call__(self, mel: Tensor) -> Tensor:
        """Finished audio (B, T) of a mel (B, M, F), every stage that a user gets included."""
        ...

    def draw(self, mel: Tensor) -> Tensor:
        """Audio (B, T) as the network leaves it, before refinement and clipping."""
        ...

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor] | None:
        """Audio (T,) of mel chunks (M, F) as it becomes final; None where it needs them all."""
        ...


class Subject(Protocol):
    """A model that can be measured.

    Attributes:
        name: as it was asked for.
        mel_config: what it takes.
        trained: whether its sound means anything.
        module: whose layers the plain path runs, None where it has none.
    """

    name: str
    mel_config: MelConfig
    trained: bool
    module: nn.Module | None

    def macs_per_second(self) -> float | None:
        """Multiply-adds for each second of audio; None where they are not counted."""
        ...

    def paths(self, precisions: Sequence[Precision], compile: bool) -> list[RunPath]:
        """The paths that it has, `PLAIN` among them."""
        ...

    def system(self, path: RunPath) -> System:
        """Made anew at each call; of a path in `paths`."""
        ...


def load_subject(name: str, device: torch.device) -> Subject:
    """A peer, an untrained size, a model that ships, or the folder of a checkpoint or run.

    Raises:
        CheckpointError: none of them.
    """
    if name == VOCOS:
        return VocosSubject(device)
    if name == GRIFFIN_LIM:
        return GriffinLimSubject()
    if name in UNTRAINED:
        return FlowSubject(name, *untrained_waveglow(UNTRAINED[name]), device, trained=False)
    try:
        folder = model_folder(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"no model {name!r}: give a folder, a model that ships "
            f"({', '.join(list_models()) or 'none'}), or a size: {', '.join(UNTRAINED)}"
        ) from error
    return FlowSubject(name, *load_checkpoint(folder), device, trained=True)


@torch.no_grad()
def untrained_waveglow(config: WaveGlowConfig) -> tuple[ModelConfig, Flow]:
    """A WaveGlow of random weights whose couplings all do real work.

    Fresh couplings are the identity, which a benchmark would take for accuracy: each last
    layer gets random weights, scaled in one pass so that shift and log-scale spread by `SPREAD`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        flow = waveglow(config).eval()
        networks = [module for module in flow.modules() if isinstance(module, WaveNet)]
        hooks = [network.end.register_forward_pre_hook(_randomise) for network in networks]
        n_frames = 16
        flow.decode(flow.noise(n_frames, [SEED]), torch.randn(1, config.n_mels, n_frames) - 5.0)
    for hook in hooks:
        hook.remove()
    return ModelConfig(model=config, mel=MEL_PRESETS["nvidia"]), flow


def _randomise(end: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(end, nn.Conv1d)
    end.weight.normal_(std=SPREAD / float(inputs[0].square().sum(1).mean().sqrt()))


def speech_mel(mel_config: MelConfig, n_frames: int, batch: int) -> Tensor:
    """What is synthesised, (B, M, F): speech, repeated to the length.

    The example that the default model comes with, if it has as many bands, else a constant.
    """
    mel = example_mel(model_folder()) if DEFAULT_MODEL in list_models() else None
    if mel is None or len(mel) != mel_config.n_mels:
        mel = torch.full((mel_config.n_mels, 1), PLAIN_LEVEL)
    return tiled(mel, n_frames).expand(batch, -1, -1).contiguous()


class FlowSubject:
    """A vocoder of this package."""

    def __init__(
        self, name: str, config: ModelConfig, flow: Flow, device: torch.device, trained: bool
    ) -> None:
        self.name = name
        self.config = config
        self.mel_config = config.mel
        self.trained = trained
        self.published = flow.to(device).prepare_for_inference()
        # Not a deep copy: it would share the classes that folding changes.
        folded = build_flow(config.model, config.mel)
        folded.load_state_dict(flow.state_dict())
        fold_weight_norm(folded)
        self.folded = folded.to(device).prepare_for_inference()
        self.module: nn.Module | None = self.folded

    def macs_per_second(self) -> float | None:
        return macs_per_second(Vocoder(self.config, self.folded))

    def paths(self, precisions: Sequence[Precision], compile: bool) -> list[RunPath]:
        paths = [PLAIN, *(RunPath("engine", precision) for precision in precisions)]
        if any(parametrize.is_parametrized(module) for module in self.published.modules()):
            paths.insert(0, RunPath("published"))
        if compile:
            paths += [RunPath("compiled", p) for p in precisions if p != "int8"]
        return paths

    def system(self, path: RunPath) -> "FlowSystem":
        # The engine gets what `waveflow.load` gives it, weight norm and all.
        flow = self.folded if path == PLAIN else self.published
        decoder = self._decoder(path, flow)
        vocoder = Vocoder(self.config, flow, lambda _: decoder)
        return FlowSystem(vocoder.to(next(flow.parameters()).device))

    def _decoder(self, path: RunPath, flow: Flow) -> Decoder:
        if path.kind in ("published", "plain"):
            return flow.decode
        mel = speech_mel(self.mel_config, CALIBRATION_FRAMES, 1)[0]
        mel = mel.to(next(flow.parameters()).device)
        return make_decoder(flow, path.precision, path.kind == "compiled", mel)


class FlowSystem:
    """A vocoder, which has its decoder."""

    def __init__(self, vocoder: Vocoder) -> None:
        self.vocoder = vocoder

    def __call__(self, mel: Tensor) -> Tensor:
        return self.vocoder(mel)

    def draw(self, mel: Tensor) -> Tensor:
        return self.vocoder.draw(mel)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor] | None:
        return self.vocoder.stream(chunks)


class PeerSystem:
    """A peer: from mel to audio, without noise, and no stage after it."""

    def __init__(self, peer: Peer) -> None:
        self.draw = peer

    def __call__(self, mel: Tensor) -> Tensor:
        return self.draw(mel)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor] | None:
        return None


class VocosSubject:
    """Vocos's network with random weights."""

    name = VOCOS
    mel_config = PEER_MEL
    trained = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.network = Vocos(PEER_MEL).to(device).eval()
        self.module: nn.Module | None = self.network

    def macs_per_second(self) -> float | None:
        mel = torch.zeros(1, PEER_MEL.n_mels, max(COUNTED_FRAMES), device=self.device)
        return macs_per_frame(self.network, mel) * PEER_MEL.sample_rate / PEER_MEL.hop_length

    def paths(self, precisions: Sequence[Precision], compile: bool) -> list[RunPath]:
        on_cpu = self.device.type == "cpu"
        paths = [PLAIN, RunPath("engine")] if on_cpu else [PLAIN]
        return [*paths, RunPath("compiled")] if compile else paths

    def system(self, path: RunPath) -> PeerSystem:
        if path.kind == "engine":
            return PeerSystem(with_packed_linears(self.network))
        return PeerSystem(self.network.compiled() if path.kind == "compiled" else self.network)


class GriffinLimSubject:
    """Griffin-Lim: no network, one path, always on the CPU."""

    name = GRIFFIN_LIM
    mel_config = PEER_MEL
    trained = False
    module: nn.Module | None = None

    def macs_per_second(self) -> float | None:
        return None

    def paths(self, precisions: Sequence[Precision], compile: bool) -> list[RunPath]:
        return [PLAIN]

    def system(self, path: RunPath) -> PeerSystem:
        return PeerSystem(griffin_lim_peer(PEER_MEL))
