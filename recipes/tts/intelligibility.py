"""Word error rate of a voice by a recogniser, beside that of recordings, and naturalness.

    python recipes/tts/intelligibility.py kathleen --voice kathleen

The recogniser is pocketsphinx with the models in its package; it knows nothing of the voice. The
voice speaks the texts of val.txt, which it was not trained on. Recordings are of the same texts,
and, as many times over, of texts of the training clips. Distill-MOS is rated where
`recipes/naturalness.py` can.

Install beside waveflow: pip install pocketsphinx
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import waveflow
from waveflow.audio.io import read_audio, resample, to_int16
from waveflow.cli.console import one_line_errors, show, show_table

sys.path.insert(0, str(Path(__file__).parent.parent))
RATE = 16000
N_OTHERS = 60


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def edits(expected: Sequence[str], found: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions between two lists of words."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(expected, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


class Recogniser:
    """pocketsphinx with its own English models."""

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            sys.exit(f"{error}; first: pip install pocketsphinx")
        self.decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def words(self, audio: np.ndarray, rate: int) -> list[str]:
        """What is heard in audio (T,) of another rate."""
        level = 0.1 / max(float(np.sqrt(np.mean(audio**2))), 1e-6)
        samples = to_int16(np.clip(resample(audio, rate, RATE) * level, -1, 1))
        # Silence around the words, as a recogniser expects it.
        quiet = np.zeros(RATE // 4, np.int16)
        self.decoder.start_utt()
        self.decoder.process_raw(np.concatenate([quiet, samples, quiet]).tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return words_of(found.hypstr) if found else []


def main() -> None:
    """Prints one row for each kind of speech."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--voice", default=None)
    parser.add_argument("--show", action="store_true", help="what was said, and what was heard")
    args = parser.parse_args()
    for name in ("metadata.csv", "val.txt", "wavs"):
        if not (args.corpus / name).exists():
            parser.error(f"{args.corpus} has no {name}: give a corpus in LJSpeech's layout")
    with open(args.corpus / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE)
        texts = {name: text for name, *_, text in rows}
    held = (args.corpus / "val.txt").read_text().split()
    others = [name for name in sorted(texts) if name not in held]
    others = others[:: max(1, len(others) // N_OTHERS)][:N_OTHERS]
    speaker = waveflow.load_speaker(args.voice)
    recogniser = Recogniser()
    try:
        from naturalness import load_distillmos, rate

        network = load_distillmos()
    except SystemExit as error:
        show(f"no Distill-MOS: {error}")
        network = None

    def recording(name: str) -> np.ndarray:
        [path] = (args.corpus / "wavs").glob(f"{name}.*")
        return read_audio(path, speaker.sample_rate)[0]

    table = [("speech", "clips", "word error rate", "Distill-MOS")]

    def measure(what: str, names: Iterable[str], audio_of) -> None:
        n_edits, n_words, ratings = 0, 0, []
        for name in names:
            audio, expected = audio_of(name), words_of(texts[name])
            found = recogniser.words(audio, speaker.sample_rate)
            n_edits += edits(expected, found)
            n_words += len(expected)
            if network is not None:
                ratings.append(rate(network, audio, speaker.sample_rate))
            if args.show:
                show(f"{what}: {' '.join(expected)} -> {' '.join(found)}")
        mos = f"{np.mean(ratings):.2f}" if ratings else "-"
        table.append((what, str(len(list(names))), f"{100 * n_edits / n_words:.1f} %", mos))

    measure("voice, texts held out", held, lambda name: speaker(texts[name]))
    measure("recordings of these texts", held, recording)
    measure("their copies by the vocoder", held,
            lambda name: speaker.vocoder.resynth(recording(name)).numpy())  # fmt: skip
    measure("recordings of other texts", others, recording)
    show_table(table, n_left=1)


if __name__ == "__main__":
    with one_line_errors():
        main()
