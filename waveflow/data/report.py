"""The report of `prepare` about the recordings that it was given."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from waveflow.data.cache import CachedClip
from waveflow.data.clips import FAULT, ClipFacts, Reason
from waveflow.data.corpus import StoredText

# Of the files left out; report.json has all.
MOST_LINES = 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LeftOut(_Frozen):
    """A recording that is not in the cache, and the reason."""

    file: StoredText
    corpus: StoredText
    reason: Reason
    detail: StoredText


class Amount(_Frozen):
    """A number of clips, and their hours of audio."""

    clips: int
    hours: float


class PrepareReport(_Frozen):
    """The content of a new cache in figures; `report.json` in the cache holds it.

    Attributes:
        sample_rate: sample rate of the cache, in Hz.
        train: amount for training.
        val: amount for validation.
        corpora: amount of each corpus, by its name.
        source_rates: number of clips by the sample rate of their file, in Hz.
        silence: share of the hops of all clips below -60 dB of full scale.
        clipped: share of the samples at full scale by file, for clips with such samples.
        notes: changes on reading (mixed down, resampled), each with the number of clips.
        left_out: every file that is not in the cache, with the reason.
        kept: number of recordings that an earlier `prepare` had read.
        clips: facts about each clip, in the cache's order.
    """

    kind: Literal["waveflow prepare report"] = "waveflow prepare report"
    sample_rate: int
    train: Amount
    val: Amount
    corpora: dict[str, Amount]
    source_rates: dict[int, int]
    silence: float
    clipped: dict[str, float]
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    kept: int
    clips: tuple[ClipFacts, ...]

    def has_fault(self) -> bool:
        """Whether a recording was left out by a fault of ours."""
        return any(clip.reason == FAULT for clip in self.left_out)

    def amounts(self) -> str:
        """Returns clips and hours as one line."""
        return (
            f"{self.train.clips} clips ({self.train.hours:.2f} hours) for training, "
            f"{self.val.clips} ({self.val.hours:.2f} hours) for validation"
        )

    def lines(self) -> list[str]:
        """Returns everything else for people, one fact a line, long lists shortened."""
        lines = []
        if len(self.corpora) > 1:
            lines += [f"{n}: {a.clips} clips, {a.hours:.2f} hours" for n, a in self.corpora.items()]
        rates = ", ".join(f"{rate} Hz ({n} clips)" for rate, n in self.source_rates.items())
        lines.append(f"sample rates: {rates}")
        lines.append(f"silence: {100 * self.silence:.1f} % is below -60 dB")
        if self.clipped:
            worst, share = max(self.clipped.items(), key=lambda item: item[1])
            lines.append(
                f"clipping: {len(self.clipped)} clips touch full scale, most of all {worst} "
                f"({100 * share:.2f} % of its samples)"
            )
        lines += self.notes
        if self.kept:
            lines.append(f"{self.kept} clips were done before and are kept")
        if self.left_out:
            count = Counter(clip.reason for clip in self.left_out)
            reasons = ", ".join(f"{n} {reason}" for reason, n in count.items())
            lines.append(f"{len(self.left_out)} files left out ({reasons}):")
            ours_first = sorted(self.left_out, key=lambda clip: clip.reason != FAULT)
            lines += [f"  {clip.detail}" for clip in ours_first[:MOST_LINES]]
            if len(self.left_out) > MOST_LINES:
                lines.append("  ... and more, all in the cache's report.json")
        return lines


def make_report(
    sample_rate: int,
    clips: Sequence[CachedClip],
    facts: Sequence[ClipFacts],
    left_out: Sequence[LeftOut],
    kept: int,
) -> PrepareReport:
    """Makes the report from a cache's clips and their facts, both in the cache's order."""

    def amount(chosen: Sequence[CachedClip]) -> Amount:
        hours = sum(clip.samples for clip in chosen) / sample_rate / 3600
        return Amount(clips=len(chosen), hours=hours)

    names = dict.fromkeys(clip.corpus for clip in clips)
    notes = Counter(note for fact in facts for note in fact.notes)
    return PrepareReport(
        sample_rate=sample_rate,
        train=amount([clip for clip in clips if clip.split == "train"]),
        val=amount([clip for clip in clips if clip.split == "val"]),
        corpora={name: amount([c for c in clips if c.corpus == name]) for name in names},
        source_rates=dict(sorted(Counter(fact.source_rate for fact in facts).items())),
        silence=sum(f.silence * f.frames for f in facts) / sum(f.frames for f in facts),
        clipped={fact.file: fact.clipped for fact in facts if fact.clipped},
        notes=tuple(f"{note} ({number} of {len(facts)} clips)" for note, number in notes.items()),
        left_out=tuple(left_out),
        kept=kept,
        clips=tuple(facts),
    )
