"""The Python of README, docs/, recipes/ and pretrained/ runs as it stands, or is listed here.

The blocks of a page share their names. Names that a page takes as given are given, and systems that
are not installed have stand-ins; test_hosts.py runs adapters in those that are.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
import test_hosts
import torch
from conftest import make_voice
from pages import PAGES, ROOT, code_blocks, identity
from torch import Tensor

# A part of a page's name or of a block, and why it is not run here.
LISTED = {
    "docs/tutorial/0": "tests/test_tutorial.py runs the scripts of which these pages are made",
    "docs/onnx.md": "takes minutes; tests/test_export.py runs it with a small model",
    '"org/name': "needs the network; tests/test_hub.py runs it with a stand-in",
}
# A part of a block, and what is run in its place.
INSTEAD = {'device="cuda"': 'device="cpu"'}
# Packages without which the Python of a page is not run.
NEEDS = {
    "docs/say.md": ("gruut",),
    "docs/hosts/transformers.md": ("transformers",),
}
N = 20
SAMPLES = N * 256
MEL = torch.from_numpy(np.load(ROOT / "pretrained" / "frameglow-cc0" / "example.npy"))[:, 40:60]
MELS = torch.stack([MEL, MEL])
# What a block makes, and its axes; None is any number of whole frames.
MADE = {
    "README.md": {"wav": (86 * 256,)},
    "docs/index.md": {"copy": (SAMPLES,)},
    "docs/using.md": {"wavs": (2, SAMPLES), "clean": (SAMPLES,)},
    "docs/hosts/coqui.md": {"wav": (2, 1, SAMPLES)},
    "docs/hosts/espnet.md": {"wav": (SAMPLES,)},
    "docs/hosts/hifigan.md": {"audio": (2, 1, SAMPLES)},
    "docs/hosts/nemo.md": {"audio": (2, SAMPLES)},
    "docs/hosts/nvidia.md": {"audio": (2, SAMPLES)},
    "docs/hosts/speechbrain.md": {"audio": (2, 1, SAMPLES)},
    "docs/hosts/torchaudio.md": {"waves": (2, SAMPLES)},
    "docs/hosts/transformers.md": {"wave": (None,), "waves": (1, None)},
    "docs/hosts/vocos.md": {"audio": (2, SAMPLES)},
}


def runnable(page: Path) -> list[str]:
    """The blocks of a page that are not listed."""
    blocks = code_blocks(page.read_text(encoding="utf-8"))
    return [b for b in blocks if not any(part in identity(page) or part in b for part in LISTED)]


RUN = [page for page in PAGES if runnable(page)]


# --- stand-ins ---


class Synthesizer:
    """Coqui's, with a text-to-mel model that knows one text."""

    def __init__(
        self,
        tts_checkpoint: str,
        tts_config_path: str,
        vocoder_checkpoint: str = "",
        vocoder_config: str = "",
    ) -> None:
        self.tts_model = SimpleNamespace(ap=SimpleNamespace(sample_rate=22050))
        self.vocoder_model: Any = None
        if vocoder_config:
            config = json.loads(Path(vocoder_config).read_text())
            assert config["audio"]["hop_length"] == 256
            model = import_module(f"TTS.vocoder.models.{config['model']}")
            self.vocoder_model = model.Waveflow(config)
            self.vocoder_model.load_checkpoint(config, vocoder_checkpoint)

    def tts(self, text: str) -> Tensor:
        return self.vocoder_model.inference(MELS)


class Text2Speech:
    """ESPnet's."""

    vocoder: Any = None

    def __init__(self, train_config: str, model_file: str) -> None: ...

    def __call__(self, text: str) -> dict[str, Tensor]:
        return {"wav": self.vocoder(MEL.T)}


def stand_ins() -> dict[str, Any]:
    """Modules of systems by name."""
    nemo, speechbrain = MagicMock(), MagicMock()
    nemo.FastPitchModel.restore_from().eval().generate_spectrogram.return_value = MELS
    speechbrain.Tacotron2.from_hparams().encode_text.return_value = MELS, None, None
    tacotron2 = SimpleNamespace(infer=lambda *_: (MELS, torch.tensor([N, N]), None))
    bundle = SimpleNamespace(
        get_text_processor=lambda: lambda texts: (None, None), get_tacotron2=lambda: tacotron2
    )
    pipelines = SimpleNamespace(TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH=bundle)
    return {
        "TTS.utils.synthesizer": SimpleNamespace(Synthesizer=Synthesizer),
        "TTS.vocoder.configs.shared_configs": SimpleNamespace(BaseVocoderConfig=object),
        # `register` puts these in.
        "TTS.vocoder.configs.waveflow_config": None,
        "TTS.vocoder.models.waveflow": None,
        "espnet2.bin.tts_inference": SimpleNamespace(Text2Speech=Text2Speech),
        "nemo.collections.tts.models": nemo,
        "speechbrain.inference.TTS": speechbrain,
        "torchaudio": SimpleNamespace(pipelines=pipelines),
    }


def given(page: str) -> dict[str, Any]:
    """The names that a page takes as given."""
    if page == "docs/hosts/transformers.md":
        ids = torch.tensor([[3, 4, 2]])  # so short that the mel's convention is not doubted
        return {
            "model": test_hosts.small_speecht5(),
            "input_ids": ids,
            "speaker": test_hosts.SPEAKER,
            "speakers": test_hosts.SPEAKER,
            "mask": torch.ones_like(ids),
            "fastspeech2": test_hosts.small_fastspeech2(),
            "tokenizer": test_hosts.small_tokenizer(),
            "fastspeech2_with_hifigan": test_hosts.small_fastspeech2_with_hifigan(),
        }
    return {
        "audio": torch.from_numpy(make_voice(1.0))[:SAMPLES],
        "mel": MELS if page.startswith("docs/hosts/") else MEL,
        "mels": MELS,
        "frames": torch.tensor([N, 12]),
        "mel_pieces": MEL.split(10, dim=1),
        "mel_outputs_postnet": MELS,
        "features": MELS,
        "play": lambda piece: None,
    }


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """Those that pages name, in the folder that tests work in."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("in.wav", make_voice(1.0), 22050)
    np.save("mel.npy", MEL.numpy())
    Path("pretrained").symlink_to(ROOT / "pretrained")
    Path("runs").mkdir()
    Path("runs/x").symlink_to(tiny_model)


@pytest.mark.parametrize("page", RUN, ids=identity)
@pytest.mark.usefixtures("files")
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = identity(page)
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    for module, stand_in in stand_ins().items():
        if any(module.partition(".")[0] in block for block in runnable(page)):
            monkeypatch.setitem(sys.modules, module, stand_in)
    names = {"__name__": "block"} | given(name)
    for block in runnable(page):
        for part, instead in INSTEAD.items():
            block = block.replace(part, instead)
        exec(compile(block, name, "exec"), names)
    for made, axes in MADE.get(name, {}).items():
        values = np.asarray(names[made])
        found = [n if axis or n % 256 else None for n, axis in zip(values.shape, axes, strict=True)]
        assert tuple(found) == axes and np.isfinite(values).all()


def test_every_entry_is_of_a_block() -> None:
    blocks = {(identity(p), b) for p in PAGES for b in code_blocks(p.read_text("utf-8"))}
    for part in (*LISTED, *INSTEAD):
        assert any(part in name or part in block for name, block in blocks), part
    pages = {name for name, _ in blocks}
    assert {*NEEDS, *MADE} <= pages and len(RUN) > 10
