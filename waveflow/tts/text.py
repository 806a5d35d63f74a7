"""English text to phonemes, by gruut: it reads numbers, dates and abbreviations and has a lexicon.

A word that the lexicon lacks is spelled by gruut's own letter-to-sound model.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

from waveflow.errors import ConfigError

BLANK = "_"
_PAUSES = (" ", ",", ".", "?", "!", ":", ";", "|", "‖")
_STRESS = ("ˈ", "ˌ")
# gruut's phonemes of American English.
_PHONEMES = dict.fromkeys(
    """
    b d d͡ʒ f h j k l m n p s t t͡ʃ v w z ð ŋ ɡ ɹ ʃ ʒ θ i u æ ɑ ɔ ə ɛ ɚ ɪ ʊ ʌ aɪ aʊ eɪ oʊ ɔɪ ɾ ʔ ɜ ɝ ɐ x
    """.split()
)
# What a model's embedding counts, in this order. A stress is a symbol before its vowel.
SYMBOLS = (BLANK, *_PAUSES, *_STRESS, *_PHONEMES)
_NUMBER = {symbol: i for i, symbol in enumerate(SYMBOLS)}

# Characters that are read at once: a sentence, or a part of one that does not end.
LONGEST_SENTENCE = 400
LONGEST_WORD = 60
# Symbols that are spoken at once, half a minute. A number of few characters can have many words.
MOST_SYMBOLS = 600


def read_sentences(text: str) -> Iterator[list[str]]:
    """The symbols of each sentence of an English text; sentences without a word are left out.

    Raises:
        ConfigError: gruut is not installed, or it cannot read the text.
    """
    try:
        import gruut
    except ImportError as error:
        raise ConfigError(
            "text to speech needs gruut, which reads English: pip install 'waveflow[tts]'"
        ) from error
    logging.getLogger("gruut").setLevel(logging.CRITICAL)  # it logs what it raises, too
    for piece in pieces_of(text):
        # Written out, the number 1e-300 has 300 words.
        words = re.sub(r"(?<=\d)[eE](?=[-+]?\d)", " e ", piece)
        try:
            sentences = [list(_symbols(s)) for s in gruut.sentences(words, lang="en-us")]
        except Exception as error:  # of numbers beyond its own, and of odd characters
            raise ConfigError(
                f"{piece!r:.60} cannot be read ({type(error).__name__}): write it in plain words"
            ) from error
        for symbols in sentences:
            yield from (part for part in _parts(symbols) if not _PHONEMES.keys().isdisjoint(part))


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of LONGEST_SENTENCE characters at most, cut where sentences or words end.

    Words of more than LONGEST_WORD characters are cut, too. Pieces without a letter or digit are
    left out.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(rf"\S{{1,{LONGEST_WORD}}}", paragraph)
        begin = 0
        while begin < len(words):
            end, length = begin, 0
            while end < len(words) and length + len(words[end]) < LONGEST_SENTENCE:
                length += len(words[end]) + 1
                end += 1
            ends = [i + 1 for i in range(begin, end) if ends_sentence(words[i])]
            end = end if end == len(words) or not ends else ends[-1]
            piece = " ".join(words[begin:end])
            if any(map(str.isalnum, piece)):
                yield piece
            begin = end


def ends_sentence(text: str) -> bool:
    """Whether a sentence ends where the text ends."""
    return text.rstrip().rstrip("\"')]\u201d\u2019").endswith((".", "!", "?"))


def _symbols(words: Iterable) -> Iterator[str]:
    """The symbols of a sentence of gruut's: phonemes, stresses, a space between words, pauses."""
    is_first = True
    for word in words:
        if word.is_break:
            yield word.text if word.text in _PAUSES else "|"
            continue
        if word.phonemes and not is_first:
            yield " "
        for phoneme in word.phonemes or ():
            is_first = False
            stress = phoneme[0] if phoneme[0] in _STRESS else ""
            yield from (s for s in (stress, phoneme.removeprefix(stress)) if s in _NUMBER)


def _parts(symbols: list[str]) -> Iterator[list[str]]:
    """Symbols in parts of MOST_SYMBOLS at most, cut between words."""
    while len(symbols) > MOST_SYMBOLS:
        spaces = [i for i, symbol in enumerate(symbols[:MOST_SYMBOLS]) if symbol == " "]
        end = spaces[-1] if spaces and spaces[-1] else MOST_SYMBOLS
        yield symbols[:end]
        symbols = symbols[end:]
    yield symbols


def numbers(symbols: Sequence[str]) -> list[int]:
    """The symbols' numbers, with a blank between and around them (Kim et al. 2020, section 4)."""
    with_blanks = [BLANK]
    for symbol in symbols:
        with_blanks += [symbol, BLANK]
    return [_NUMBER[symbol] for symbol in with_blanks]
