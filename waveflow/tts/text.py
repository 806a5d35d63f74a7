"""Text to phonemes, by gruut, which reads numbers, dates and abbreviations and ships its lexicon."""

from collections.abc import Sequence

# gruut's phonemes of American English; stress is a symbol of its own.
_PHONEMES = (
    "b d d͡ʒ f h j k l m n p s t t͡ʃ v w z ð ŋ ɡ ɹ ʃ ʒ θ i u æ ɑ ɔ ə ɛ ɚ ɪ ʊ ʌ aɪ aʊ eɪ oʊ ɔɪ ɾ ʔ "
    "ɜ ɝ ɐ x"
).split()
_STRESS = ("ˈ", "ˌ")
_PAUSES = (" ", ",", ".", "?", "!", ":", ";", "|", "‖")
BLANK = "_"
SYMBOLS = (BLANK, *_PAUSES, *_STRESS, *_PHONEMES)
_NUMBER = {symbol: i for i, symbol in enumerate(SYMBOLS)}


def phonemes(text: str) -> list[str]:
    """Symbols of a text, words apart by a space."""
    import gruut

    found: list[str] = []
    for sentence in gruut.sentences(text, lang="en-us"):
        for word in sentence:
            if word.is_break:
                found += [word.text if word.text in _PAUSES else word.phonemes[0]]
                continue
            if not word.phonemes:
                continue
            if found and found[-1] != " ":
                found.append(" ")
            for phoneme in word.phonemes:
                for mark in _STRESS:
                    if phoneme.startswith(mark):
                        found.append(mark)
                        phoneme = phoneme[len(mark) :]
                found.append(phoneme)
    return [symbol for symbol in found if symbol in _NUMBER]


def numbers(symbols: Sequence[str]) -> list[int]:
    """The symbols' numbers, with a blank between and around them (Kim et al. 2020, section 4)."""
    with_blanks = [BLANK]
    for symbol in symbols:
        with_blanks += [symbol, BLANK]
    return [_NUMBER[symbol] for symbol in with_blanks]
