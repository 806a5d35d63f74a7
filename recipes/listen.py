"""Makes docs/listen/: recordings beside their copies, to hear and to see, with figures.

    python recipes/listen.py CLIP... [--model NAME|PATH]

Clips are CC0 recordings that the model was not trained on, in VOICE/wavs/. Writes MP3, because
every browser plays it, a picture for each clip, and index.html. Needs the extras `eval` and `plot`.
"""

import argparse
import io
import shutil
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
from pictures import draw
from PIL import Image

import waveflow
from waveflow.audio.io import read_audio
from waveflow.cli.console import one_line_errors
from waveflow.files import temporary_folder
from waveflow.metrics.copies import copies
from waveflow.metrics.quality import FloatArray, pesq_wb
from waveflow.metrics.spectral import log_mel_l1
from waveflow.metrics.voicing import voicing

FOLDER = Path(__file__).parent.parent / "docs" / "listen"
SECONDS = 4.0
OTHERS = {
    "model + 0 steps": "copy without refinement",
    "Griffin-Lim 60": "Griffin-Lim, 60 iterations",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>waveflow: listen</title>
<style>
body {{ max-width: 62rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
.takes {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
audio, img {{ width: 100%; }}
</style>
</head>
<body>
<h1>Listen</h1>
<p>Each recording was turned into a mel spectrogram (80 bands), and the mel back into audio by
<strong>{model}</strong> on one CPU thread. The model never heard these recordings. "Without
refinement" is the plain draw of the flow. Griffin-Lim needs no model. PESQ, from 1 to 4.6, and the
distance of log mels compare a copy with its recording.</p>
<p>The recordings are CC0: the voices kathleen, flemishguy, kerstin and nathalie of the rhasspy
datasets. So are the copies.</p>
{clips}
</body>
</html>
"""


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vocoder = waveflow.load(args.model)
    name = vocoder.folder.name if vocoder.folder else "a model"
    with temporary_folder(FOLDER) as made:
        clips = enumerate(args.clips, start=1)
        sections = [section(vocoder, path, number, made) for number, path in clips]
        page = PAGE.format(model=escape(name), clips="\n".join(sections))
        (made / "index.html").write_text(page, encoding="utf-8")
        size = sum(path.stat().st_size for path in made.iterdir())
        # The page before it stays until this one is whole.
        shutil.rmtree(FOLDER, ignore_errors=True)
        made.rename(FOLDER)
    print(f"{FOLDER}: {len(sections)} clips, {size / 1e6:.2f} MB")


def section(vocoder: waveflow.Vocoder, path: Path, number: int, folder: Path) -> str:
    """The part of the page of one clip, whose files are written."""
    rate = vocoder.sample_rate
    audio = read_audio(path, rate)[0][: int(SECONDS * rate)]
    made = copies(vocoder, audio)
    systems = {"recording": "recording", f"model + {vocoder.refine_steps} steps": "copy"} | OTHERS
    shown = [(title, made[name]) for name, title in systems.items()]
    takes = []
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.4), sharey=True)
    for axis, (title, samples) in zip(axes, shown, strict=True):
        draw(axis, title, samples, rate)
        sound = f"{number}-{title.split(',')[0].replace(' ', '-')}.mp3"
        soundfile.write(folder / sound, samples, rate, compression_level=0.2)
        label = f"clip {number}, {title}"
        takes.append(
            f"<figure><figcaption>{title}</figcaption>\n"
            f'<audio controls preload="none" src="{sound}" aria-label="{label}"></audio>\n'
            f"{figures(vocoder, audio, samples)}</figure>\n"
        )
    axes[0].set_ylabel("kHz")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=70)
    plt.close(figure)
    # 64 colours: a third of the size, and next to no difference.
    picture = Image.open(drawn).convert("RGB").quantize(64)
    picture.save(folder / f"{number}.png", optimize=True)
    voice = escape(path.parent.parent.name)
    titles = ", ".join(title for title, _ in shown)
    return (
        f"<h2>{number}. {voice}</h2>\n"
        f'<img src="{number}.png" alt="Spectrograms to 8 kHz, from left to right: {titles}">\n'
        f'<div class="takes">\n{"".join(takes)}</div>'
    )


def figures(vocoder: waveflow.Vocoder, audio: FloatArray, copy: FloatArray) -> str:
    """A line of figures; empty for the recording itself."""
    if np.array_equal(audio, copy):
        return ""
    rate = vocoder.sample_rate
    f1, cents = voicing(audio, copy, rate)
    return (
        f"<small>PESQ {pesq_wb(audio, copy, rate):.2f}, log-mel "
        f"{log_mel_l1(audio, copy, vocoder.mel):.2f}, voicing F1 {f1:.2f}, F0 {cents:.0f} "
        "cents</small>"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
