"""`export`: a vocoder as an ONNX graph or a program of torch.export, compared before it is kept."""

import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from waveflow.engine.fast.int8 import speech_like_mel
from waveflow.engine.options import SynthesisOptions
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError
from waveflow.export.card import (
    AUDIO,
    CARD,
    FEWEST_FRAMES,
    LOG_PROB,
    MEL,
    NOISE,
    SIGMA,
    GraphCard,
)
from waveflow.export.program import Listener, Speaker, traced, traced_listener
from waveflow.files import output_path

Weights = Literal["float32", "float16", "int8"]
SUFFIXES = (".onnx", ".pt2")
# The lengths at which a graph is compared with its model.
CHECKED_FRAMES = (FEWEST_FRAMES, 5, 20, 87, 301)
_OPSET = 20
# Smaller tensors (biases, scales) stay float32.
_FEWEST_HALVED, _FEWEST_QUANTISED = 256, 4096

Run = Callable[..., torch.Tensor]


class Export(NamedTuple):
    """What was written.

    Attributes:
        n_bytes: size of the file.
        error: largest difference from the model's own audio at `CHECKED_FRAMES`.
        decibels: energy of the difference over that of the audio.
    """

    n_bytes: int
    error: float
    decibels: float


def export(
    vocoder: Vocoder,
    out: Path,
    inputs: Collection[str] | None = None,
    sigma: float | None = None,
    refine: int | None = None,
    weights: Weights = "float32",
) -> Export:
    """Writes a vocoder as a graph of `mel` (B, M, F), F >= 3, to `audio` (B, F hop_length).

    The audio lies in [-1, 1].

    Args:
        vocoder: on a CPU.
        out: a .onnx file; or a .pt2 file, for `torch.export.load`, which has all inputs.
        inputs: of an ONNX graph, beside the mel: "sigma" (), "noise" (B, C, L), standard normal,
            or both. Without noise as an input the graph draws it, anew in each call.
        sigma: standard deviation of the noise; None: the model's own. Where it is an input, it is
            only a proposal in the graph's metadata.
        refine: mel refinement steps inside the graph; None: the model's own.
        weights: how matrices are stored; all is computed in float32. float16 halves the file. int8
            stores those that the noise goes through in 8 bits, and others, which decide on pitch
            and level, in 16.

    Raises:
        ConfigError: an option out of range, a missing extra, or a flow that cannot be exported.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out}: name a file that ends in {' or '.join(SUFFIXES)}")
    is_onnx = out.suffix == ".onnx"
    if inputs is None:
        inputs = () if is_onnx else (SIGMA, NOISE)
    if unknown := set(inputs) - {SIGMA, NOISE}:
        raise ConfigError(f"input {sorted(unknown)[0]!r}: give sigma, noise or both")
    if weights not in get_args(Weights):
        raise ConfigError(f"weights {weights!r}: give {', '.join(get_args(Weights))}")
    _check_device(vocoder)
    if is_onnx:
        _check_extra()
    elif weights != "float32" or len(inputs) < 2:
        raise ConfigError(f"{out}: weights and inputs are chosen for .onnx files only")
    card = _card_of(vocoder, SynthesisOptions(sigma, refine=refine))
    speaker = Speaker(vocoder, card.refine).eval()
    program = traced(speaker, card)
    with output_path(out) as temporary:
        if is_onnx:
            graph = _graph_of(program)
            if weights != "float32":
                _store_small(graph.graph, weights)
            error, decibels = _compared(speaker, vocoder, card, _session(graph))
            _save(graph, card, inputs, temporary)
        else:
            torch.export.save(program, temporary)
            run = torch.export.load(temporary).module()
            error, decibels = _compared(speaker, vocoder, card, run)
        return Export(temporary.stat().st_size, error, decibels)


def export_listener(vocoder: Vocoder, out: Path, weights: Weights = "float32") -> Export:
    """Writes the other way as an ONNX graph: `audio` (1, T) to what the model makes of it.

    The outputs are `mel` (1, M, F), `noise` (1, C, L), of which a graph of `export` makes this
    audio at sigma 1 without refinement, and `log_prob` (1, F), nats per sample of each frame. T is
    a whole number of frames, 3 or more.

    Args:
        vocoder, out: as `export`.
        weights: float32 or float16.

    Returns:
        Size, and the largest error of noise and log_prob.

    Raises:
        ConfigError: as `export`, or a likelihood that is a bound.
    """
    if out.suffix != ".onnx":
        raise ConfigError(f"{out}: name a file that ends in .onnx")
    if weights not in ("float32", "float16"):
        raise ConfigError(f"weights {weights!r}: this graph has float32 or float16")
    _check_device(vocoder)
    _check_extra()
    listener = Listener(vocoder).eval()
    outputs = (MEL, NOISE, LOG_PROB)
    graph = _graph_of(traced_listener(listener), outputs)
    if weights != "float32":
        # They are no weights, and what leads to the noise is no network that mends their errors.
        _store_small(graph.graph, weights, exact=("spectrogram.", "transform."))
    session = _session_of(graph)
    with torch.no_grad():
        example = vocoder.example_mel()
        mel = speech_like_mel(vocoder.mel_config.n_mels, 87) if example is None else example
        audio = vocoder.draw(mel)[None]
        vocoder.log_prob_by_frame(audio[0], mel)  # refuses what is no sum over frames
        expected = listener(audio)
    found = session.run(outputs, {AUDIO: audio.numpy()})
    errors = [float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True)]
    with output_path(out) as temporary:
        _save_checked(graph, _card_of(vocoder, SynthesisOptions()), {}, temporary)
        return Export(temporary.stat().st_size, max(errors[1:]), float("nan"))


def _card_of(vocoder: Vocoder, options: SynthesisOptions) -> GraphCard:
    flow, own = vocoder.flow, vocoder.config.synthesis
    return GraphCard(
        model=vocoder.config.model.type,
        mel=vocoder.mel_config,
        noise_channels=flow.latent_channels,
        noise_per_frame=flow.hop_length // flow.channels,
        sigma=own.sigma if options.sigma is None else options.sigma,
        refine=vocoder.refine_steps if options.refine is None else options.refine,
        judges=vocoder.judges_mels,
    )


def _check_device(vocoder: Vocoder) -> None:
    if vocoder.device.type != "cpu":
        raise ConfigError(f"a model on {vocoder.device} is not exported: load it on cpu")


def _check_extra() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"an ONNX graph is made with {error.name}: pip install 'waveflow[onnx]'"
        ) from error


def _graph_of(program: torch.export.ExportedProgram, outputs: Sequence[str] = (AUDIO,)) -> Any:
    """The program as an ONNX model, without the places of this machine's files."""
    from onnxscript import optimizer

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what torch has not installed is nobody's concern
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, dynamo=True, opset_version=_OPSET, optimize=False, verbose=False
            )
            assert made is not None
            # All of its optimisation takes a minute, and the graph runs no faster than with these.
            for improve in (
                optimizer.inline,
                optimizer.fold_constants,
                optimizer.remove_unused_nodes,
            ):
                improve(made.model)
    finally:
        logger.setLevel(level)
    model: Any = made.model_proto
    graph = model.graph
    names = dict(zip((output.name for output in graph.output), outputs, strict=True))
    for node in graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]
    for output in graph.output:
        output.name = names[output.name]
    for group in (graph.input, graph.output, graph.value_info, graph.initializer, graph.node):
        for item in group:
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
    return model


def _save(model: Any, card: GraphCard, inputs: Collection[str], path: Path) -> None:
    """Fixes what is no input, names the graph and writes it."""
    from onnx import numpy_helper

    graph = model.graph
    if SIGMA not in inputs:
        sigma = np.asarray(card.sigma, np.float32)
        graph.initializer.append(numpy_helper.from_array(sigma, SIGMA))
    if NOISE not in inputs:
        _draw_inside(graph, card)
    kept = [value for value in graph.input if value.name in (MEL, *inputs)]
    del graph.input[:]
    graph.input.extend(kept)
    # sherpa-onnx and others that take a HiFi-GAN read these two.
    facts = {"model_type": "hifigan", "sample_rate": str(card.mel.sample_rate)}
    _save_checked(model, card, facts, path)


def _save_checked(model: Any, card: GraphCard, facts: dict[str, str], path: Path) -> None:
    import onnx

    onnx.helper.set_model_props(model, facts | {CARD: card.model_dump_json()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _draw_inside(graph: Any, card: GraphCard) -> None:
    """Adds nodes that draw the noise (B, C, L) for the mel at hand."""
    from onnx import TensorProto, helper, numpy_helper

    for name, size in (
        ("noise_channels", card.noise_channels),
        ("per_frame", card.noise_per_frame),
    ):
        graph.initializer.append(numpy_helper.from_array(np.array([size], np.int64), name))
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    nodes = [
        helper.make_node("Shape", [MEL], ["noise_items"], start=0, end=1),
        helper.make_node("Shape", [MEL], ["noise_frames"], start=2, end=3),
        helper.make_node("Mul", ["noise_frames", "per_frame"], ["noise_positions"]),
        helper.make_node(
            "Concat", ["noise_items", "noise_channels", "noise_positions"], ["noise_shape"], axis=0
        ),
        helper.make_node("ConstantOfShape", ["noise_shape"], ["noise_zeros"], value=zero),
        helper.make_node("RandomNormalLike", ["noise_zeros"], [NOISE]),
    ]
    _put_first(graph, nodes)


def _store_small(graph: Any, weights: Weights, exact: Sequence[str] = ()) -> None:
    """Stores large tensors in fewer bits, each with a node that makes it float32 again.

    Those whose names have a part that is `exact` stay as they are.
    """
    from onnx import TensorProto, helper, numpy_helper

    through = _weights_of_noise(graph) if weights == "int8" else {}
    nodes = []
    for tensor in list(graph.initializer):
        name, values = tensor.name, numpy_helper.to_array(tensor)
        stored, scale_name = f"{name}_stored", f"{name}_scale"
        stays = values.size < _FEWEST_HALVED or any(part in name for part in exact)
        if values.dtype != np.float32 or stays:
            continue
        if name in through and values.size >= _FEWEST_QUANTISED:
            axis = through[name] % values.ndim
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = np.maximum(np.abs(values).max(others, keepdims=True) / 127, 1e-30)
            small = np.round(values / scale).astype(np.int8)
            steps = scale.astype(np.float32).reshape(-1)
            graph.initializer.append(numpy_helper.from_array(steps, scale_name))
            nodes.append(
                helper.make_node("DequantizeLinear", [stored, scale_name], [name], axis=axis)
            )
        else:
            small = values.astype(np.float16)
            nodes.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(small, stored))
    _put_first(graph, nodes)


def _weights_of_noise(graph: Any) -> dict[str, int]:
    """Weights that are applied to something that depends on the noise: the axis of their outputs.

    The others decide on pitch and level, where a small error moves the phase of all that follows.
    """
    depends, found = {NOISE}, dict[str, int]()
    for node in graph.node:
        if depends & set(node.input):
            depends |= set(node.output)
            if node.op_type in ("MatMul", "Conv", "Gemm"):
                is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
                found[node.input[1]] = 0 if node.op_type == "Conv" or is_transposed else -1
    return found


def _put_first(graph: Any, nodes: list[Any]) -> None:
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _session_of(model: Any) -> Any:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=providers)


def _session(model: Any) -> Run:
    session = _session_of(model)

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        [audio] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(audio)

    return run


@torch.no_grad()
def _compared(speaker: Speaker, vocoder: Vocoder, card: GraphCard, run: Run) -> tuple[float, float]:
    """`Export.error` and `Export.decibels`, on the mel that came with the model."""
    mel = vocoder.example_mel()
    if mel is None:
        mel = speech_like_mel(card.mel.n_mels, max(CHECKED_FRAMES))
    mel = mel.repeat(1, -(-max(CHECKED_FRAMES) // mel.shape[1]))
    differences, audio = [], []
    for n_frames in CHECKED_FRAMES:
        pair = torch.stack([mel[:, :n_frames], mel[:, -n_frames:]])
        inputs = speaker.example(pair, card.sigma)
        expected = speaker(**inputs)
        differences.append((run(**inputs) - expected).flatten())
        audio.append(expected.flatten())
    difference, whole = torch.cat(differences), torch.cat(audio)
    ratio = float(difference.square().mean() / whole.square().mean().clamp_min(1e-30))
    return float(difference.abs().max()), 10 * float(np.log10(max(ratio, 1e-30)))
