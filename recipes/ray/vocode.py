"""A folder of mels to recordings as a Ray Data pipeline, on one machine or a cluster that exists.

    pip install 'ray[data]'
    python recipes/ray/vocode.py mels/ wavs/ --actors 4

Each actor loads the model once and takes mels by the batch. Ray starts a lost actor anew and gives
its batch to another one. A file is written to a temporary name and renamed, and one that is there
is not made again, so each is made once and whole; the same command goes on where it was stopped.
On a cluster both folders are on a disk that all machines share.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

import waveflow
from waveflow.audio.io import MEL_SUFFIXES, find_files, read_mel, write_audio
from waveflow.engine.options import Speech, SynthesisOptions
from waveflow.engine.together import batches, speak_together
from waveflow.errors import WaveflowError
from waveflow.pretrained import model_folder


class Speaker:
    """An actor: the model, and what it makes of a batch of names.

    Args:
        model: as `waveflow.load` takes it.
        mels, wavs: folders.
        device: of the model.
        convention: of the mels; None: the model's own.
    """

    def __init__(
        self, model: str | None, mels: str, wavs: str, device: str, convention: str | None
    ) -> None:
        self.vocoder = waveflow.load(model, device=device)
        self.mels, self.wavs = Path(mels), Path(wavs)
        self.convention = convention

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"name"} to {"name", "seconds", "fault"}."""
        names = [str(name) for name in batch["name"]]
        done: dict[str, tuple[float, str]] = {}
        mels: dict[str, np.ndarray] = {}
        for name in names:
            done[name] = 0.0, ""
            if not self._target(name).exists():
                try:
                    mels[name] = read_mel(self.mels / name)
                except Exception as error:  # the others go on
                    done[name] = 0.0, str(error)
        waiting = list(mels)
        frames = [mels[name].shape[1] for name in waiting]
        for numbers in batches(frames, self.vocoder.device.type):
            group = [waiting[i] for i in numbers]
            wanted = [SynthesisOptions(convention=self.convention)] * len(group)
            spoken = speak_together(self.vocoder, [mels[name] for name in group], wanted)
            for name, speech in zip(group, spoken, strict=True):
                done[name] = self._written(name, speech)
        seconds, faults = zip(*(done[name] for name in names), strict=True)
        return {"name": batch["name"], "seconds": np.array(seconds), "fault": np.array(faults)}

    def _target(self, name: str) -> Path:
        return (self.wavs / name).with_suffix(".wav")

    def _written(self, name: str, speech: Speech | Exception) -> tuple[float, str]:
        if isinstance(speech, Exception):
            return 0.0, str(speech)
        target, audio = self._target(name), speech.audio.cpu().numpy()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_audio(target, audio, self.vocoder.sample_rate)
        except (WaveflowError, OSError) as error:
            return 0.0, str(error)
        return len(audio) / self.vocoder.sample_rate, ""


def main() -> int:
    """Runs the pipeline; 2 if a file could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mels")
    parser.add_argument("wavs")
    parser.add_argument("--model")
    parser.add_argument("--convention")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="mels for a call of an actor")
    parser.add_argument("--cpus", type=float, default=1, help="of an actor")
    parser.add_argument("--gpus", type=float, default=0, help="of an actor; 1 puts it on a GPU")
    args = parser.parse_args()
    try:
        names, left_out = find_files(args.mels, MEL_SUFFIXES)
        model_folder(args.model)
    except WaveflowError as error:
        sys.exit(f"vocode.py: {error}")
    if len({Path(name).with_suffix("") for name in names}) < len(names):
        sys.exit("vocode.py: two mels differ in their suffix only, and would become one recording")
    for why in left_out:
        print(f"left out: {why}", file=sys.stderr)
    settings = {
        "model": args.model,
        "mels": str(Path(args.mels).resolve()),
        "wavs": str(Path(args.wavs).resolve()),
        "device": "cuda" if args.gpus else "cpu",
        "convention": args.convention,
    }
    made = ray.data.from_items([{"name": name} for name in names]).map_batches(
        Speaker,
        fn_constructor_kwargs=settings,
        batch_size=args.batch,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=args.cpus,
        num_gpus=args.gpus or None,
    )
    seconds, n_faults = 0.0, 0
    for row in made.iter_rows():
        seconds += row["seconds"]
        if row["fault"]:
            n_faults += 1
            print(f"{row['name']}: {row['fault']}", file=sys.stderr)
    print(f"{len(names) - n_faults} of {len(names)} recordings are there, {seconds:.0f} s new")
    return 2 if n_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
