"""Trains a voice: a Glow-TTS on a corpus with texts, LJSpeech's layout. Resumes by itself.

    python recipes/tts/train.py --data kathleen --out runs/voice --minutes 120

The state is written every few minutes, and the voice of the running average beside it in OUT/voice.
"""

import argparse
import csv
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import waveflow
from waveflow.audio.io import read_audio
from waveflow.files import output_path
from waveflow.model_files import read_card
from waveflow.pretrained import model_folder
from waveflow.tts.glow_tts import GlowTTS, GlowTTSConfig
from waveflow.tts.text import numbers, read_sentences
from waveflow.tts.voice import VoiceCard, save_voice

CLIP_NORM = 5.0
SAVE_SECONDS = 180
SHOW_STEPS = 50


class Clip(NamedTuple):
    """A clip: its name, its symbols (S,) and its mel (M, F)."""

    name: str
    symbols: Tensor
    mel: Tensor


def read_clips(corpus: Path) -> tuple[list[Clip], list[Clip]]:
    """The clips to train on, and those that val.txt holds out."""
    spectrogram = waveflow.MelSpectrogram(read_card(model_folder()).mel)
    held_out = set((corpus / "val.txt").read_text().split())
    train, held = [], []
    with open(corpus / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE))
    for name, *_, text in rows:
        [path] = (corpus / "wavs").glob(f"{name}.*")
        audio, _, _ = read_audio(path, spectrogram.config.sample_rate)
        mel = trimmed(spectrogram(torch.from_numpy(audio)))
        symbols = torch.tensor(numbers([s for part in read_sentences(text) for s in part]))
        if len(symbols) <= mel.shape[1]:
            (held if name in held_out else train).append(Clip(name, symbols, mel))
    return train, held


def trimmed(mel: Tensor) -> Tensor:
    """A mel without the silence at its ends, with an even number of frames."""
    level = mel.mean(0)
    loud = (level > level.max() - 5).nonzero()[:, 0]
    mel = mel[:, max(0, int(loud[0]) - 4) : int(loud[-1]) + 6]
    return mel[:, : mel.shape[1] // 2 * 2]


def batch_of(clips: list[Clip]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `GlowTTS.forward`."""
    n_symbols = torch.tensor([len(clip.symbols) for clip in clips])
    n_frames = torch.tensor([clip.mel.shape[1] for clip in clips])
    text = torch.zeros(len(clips), int(n_symbols.max()), dtype=torch.long)
    mel = torch.zeros(len(clips), clips[0].mel.shape[0], int(n_frames.max()))
    for i, clip in enumerate(clips):
        text[i, : len(clip.symbols)] = clip.symbols
        mel[i, :, : clip.mel.shape[1]] = clip.mel
    return text, n_symbols, mel, n_frames


def batches(clips: list[Clip], size: int) -> Iterator[list[Clip]]:
    """Epoch after epoch in random order; clips of about one length share a batch."""
    while True:
        order = sorted(clips, key=lambda clip: clip.mel.shape[1] + 60 * random.random())
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        random.shuffle(groups)
        yield from groups


def rate_at(step: int, highest: float) -> float:
    """Warms up for 200 steps, then falls as 1 / sqrt(step) from step 2,000 on."""
    return highest * min(1.0, (step + 1) / 200, (2000 / (step + 1)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120, help="of this call")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--licence", default="CC0-1.0", help="of the corpus and the voice")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train, held = read_clips(args.data)
    torch.manual_seed(0)
    config, mel = GlowTTSConfig(), read_card(model_folder()).mel
    model, average = GlowTTS(config, mel.n_mels), GlowTTS(config, mel.n_mels).eval()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} clips")
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, (0.9, 0.98))
    step, state = 0, args.out / "state.pt"
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        step = kept["step"]
        for part, name in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(kept[name])
    random.seed(step)

    def save() -> None:
        with torch.no_grad():
            terms = average(*batch_of(held))
        likelihood, duration = float(terms.log_likelihood), float(terms.duration)
        print(f"step {step}: held out {likelihood:.4f} nats, durations {duration:.3f}", flush=True)
        parts = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        with output_path(state) as temporary:
            torch.save(parts, temporary)
        card = VoiceCard(
            model=config,
            mel=mel,
            data=args.data.name,
            licence=args.licence,
            steps=step,
            log_likelihood=likelihood,
        )
        save_voice(args.out / "voice", card, average)

    begin = saved = time.monotonic()
    seen: list[tuple[float, float]] = []
    for group in batches(train, args.batch):
        if time.monotonic() > begin + 60 * args.minutes:
            break
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate_at(step, args.rate)
        terms = model.train()(*batch_of(group))
        optimizer.zero_grad()
        (terms.duration - terms.log_likelihood).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        step += 1
        # The mean of about the last tenth of the steps.
        with torch.no_grad():
            for mean, now in zip(*(m.state_dict().values() for m in (average, model)), strict=True):
                mean.lerp_(now, 10 / (step + 9)) if now.is_floating_point() else mean.copy_(now)
        seen.append((terms.log_likelihood.item(), terms.duration.item()))
        if step % SHOW_STEPS == 0:
            likelihood, duration = np.mean(seen[-SHOW_STEPS:], 0)
            took = time.monotonic() - begin
            print(f"step {step}: {likelihood:.4f} nats, durations {duration:.3f}, {took:.0f} s")
        if time.monotonic() > saved + SAVE_SECONDS:
            save()
            saved = time.monotonic()
    save()


if __name__ == "__main__":
    main()
