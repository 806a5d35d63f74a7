"""Trains a Glow-TTS on a corpus with a metadata.csv; resumes by itself. A study, not the product yet."""

import argparse
import csv
import random
import time
from pathlib import Path

import numpy as np
import torch

from waveflow.audio.io import read_audio
from waveflow.audio.mel import MEL_PRESETS, MelSpectrogram
from waveflow.tts.glow_tts import GlowTTS
from waveflow.tts.text import numbers, phonemes


def load(corpus: Path, cache: Path) -> dict[str, list]:
    """Clips of text and mel, by split."""
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    spectrogram = MelSpectrogram(MEL_PRESETS["hifigan"])
    held = set((corpus / "val.txt").read_text().split())
    clips: dict[str, list] = {"train": [], "val": []}
    for row in csv.reader(open(corpus / "metadata.csv"), delimiter="|", quoting=csv.QUOTE_NONE):
        [path] = (corpus / "wavs").glob(f"{row[0]}.*")
        audio, _, _ = read_audio(path, 22050)
        mel = spectrogram(torch.from_numpy(audio))
        # Silence at the ends is nobody's.
        loud = (mel.mean(0) > mel.mean(0).max() - 5).nonzero()[:, 0]
        mel = mel[:, max(0, loud[0] - 4) : loud[-1] + 6]
        mel = mel[:, : mel.shape[1] // 2 * 2]
        text = numbers(phonemes(row[-1]))
        if len(text) <= mel.shape[1]:
            clips["val" if row[0] in held else "train"].append(
                (row[-1], torch.tensor(text), mel.half())
            )
    torch.save(clips, cache)
    return clips


def batch(clips: list) -> tuple[torch.Tensor, ...]:
    n_symbols = torch.tensor([len(c[1]) for c in clips])
    n_frames = torch.tensor([c[2].shape[1] for c in clips])
    text = torch.zeros(len(clips), int(n_symbols.max()), dtype=torch.long)
    mel = torch.zeros(len(clips), 80, int(n_frames.max()))
    for i, (_, symbols, frames) in enumerate(clips):
        text[i, : len(symbols)] = symbols
        mel[i, :, : frames.shape[1]] = frames.float()
    return text, n_symbols, mel, n_frames


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    clips = load(args.data, args.out / "clips.pt")
    torch.manual_seed(0)
    model = GlowTTS()
    average = GlowTTS()
    print(sum(p.numel() for p in model.parameters()), "parameters", {k: len(v) for k, v in clips.items()}, flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, (0.9, 0.98), weight_decay=1e-2)
    step, state = 0, args.out / "state.pt"
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"]); average.load_state_dict(kept["average"])
        optimizer.load_state_dict(kept["optimizer"]); step = kept["step"]
    begin, saved, seen = time.time(), time.time(), []
    while time.time() - begin < 60 * args.minutes:
        order = sorted(clips["train"], key=lambda c: c[2].shape[1] + random.random() * 60)
        groups = [order[i : i + args.batch] for i in range(0, len(order), args.batch)]
        random.shuffle(groups)
        for group in groups:
            rate = args.rate * min(1, (step + 1) / 200) * min(1.0, (2000 / (step + 1)) ** 0.5)
            for g in optimizer.param_groups:
                g["lr"] = rate
            model.train()
            terms = model(*batch(group))
            optimizer.zero_grad()
            (terms.nll + terms.duration).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            step += 1
            decay = min(0.998, step / (step + 100))
            with torch.no_grad():
                for a, b in zip(average.state_dict().values(), model.state_dict().values()):
                    a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)
            seen.append((terms.nll.item(), terms.duration.item()))
            if step % 25 == 0:
                nll, duration = np.mean(seen[-25:], 0)
                print(f"step {step} nll {nll:.4f} dur {duration:.3f} norm {norm:.2f} {time.time() - begin:.0f} s", flush=True)
            if time.time() - saved > 120 or time.time() - begin > 60 * args.minutes:
                saved = time.time()
                average.eval()
                with torch.no_grad():
                    held = average(*batch(clips["val"]))
                print(f"  held: step {step} nll {held.nll:.4f} dur {held.duration:.3f}", flush=True)
                torch.save({"model": model.state_dict(), "average": average.state_dict(),
                            "optimizer": optimizer.state_dict(), "step": step}, state)
                if time.time() - begin > 60 * args.minutes:
                    return


if __name__ == "__main__":
    main()
