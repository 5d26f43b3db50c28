"""Single texts: broken encodings, characters nobody sees, letters of a foreign alphabet, and text that plays a control token.

mojibake            UTF-8 read as a legacy encoding, once or twice (told by writing the characters back in that encoding: they
                    are then valid UTF-8), U+FFFD, C1 controls, UTF-16 read byte by byte, another alphabet read as Latin-1,
                    and apostrophes that became `?`. With ftfy also its table of characters that stand side by side only
                    after mis-decoding.
hidden_unicode      what Unicode calls format, default-ignorable or control characters (tab and line breaks aside), where the
                    script around them has no use for them: zero-width joiners in emoji, Persian or Hindi are left alone.
homoglyph           Cyrillic or Greek letters that look Latin inside a Latin word, and the other way round.
control_token_text  the tokenizer's own control tokens, the markers of known chat formats, and transcripts inside one message.

Promises: pure ASCII text costs a few searches; nothing is flagged for being accented, typographic, mathematical, an emoji or of
any script. Does not see: legacy text read as another legacy encoding of the same alphabet (`é` as `È`), bytes that were dropped
without trace, whole words of another alphabet's look-alikes.
"""

from __future__ import annotations

import importlib.util
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from fullrank.data.audit.finding import Sighting
from fullrank.data.audit.sightings import Span, Spans
from fullrank.data.subject import Subject

KINDS = ("mojibake", "hidden_unicode", "homoglyph", "control_token_text")


class TextChecks:
    """The checks of every text of a record; can be pickled, and is best made once in each worker.

    Args:
        control_tokens: the tokenizer's control tokens as text, and no others of its added tokens.
        skip: kinds that are not looked for.
    """

    def __init__(self, control_tokens: Sequence[str], skip: frozenset[str] = frozenset()) -> None:
        self._mojibake = None if "mojibake" in skip else _Mojibake()
        self._hidden = "hidden_unicode" not in skip
        self._homoglyphs = "homoglyph" not in skip
        self._tokens = None if "control_token_text" in skip else _Tokens(control_tokens)

    def look(self, subject: Subject) -> list[Sighting]:
        """What is seen in the texts of a record, text by text."""
        found: list[Sighting] = []
        for place, role, text in (*subject.parts, *subject.tools):
            ascii_only = text.isascii()
            # UTF-8 of ASCII is the text itself; deleting from bytes is the fastest search for any of many characters.
            plain = ascii_only and len(text.encode().translate(None, _ASCII_CONTROLS)) == len(text)
            seen = self._mojibake.look(text, plain, ascii_only) if self._mojibake else Spans()
            broken = frozenset(seen)
            # A soft hyphen or a Cyrillic letter inside mojibake is a byte of it.
            if self._hidden and not plain:
                seen.extend(hidden_in(text))
            hidden = frozenset(seen)
            if self._homoglyphs and not ascii_only:
                seen.extend(homoglyphs_in(text))
            for span in seen:
                kind = "mojibake" if span in broken else "hidden_unicode" if span in hidden else "homoglyph"
                found.append(Sighting(kind, span[0], place, span[1], span[2]))
            if self._tokens:
                marks = self._tokens.look(text, by_the_model=role == "assistant")
                found += [Sighting("control_token_text", what, place, *span) for what, *span in marks]
        return found


def left_out() -> dict[str, str]:
    """Kind -> what is not looked for because a package is missing."""
    if importlib.util.find_spec("ftfy") is not None:
        return {}
    return {
        "mojibake": "only what is valid UTF-8 after re-encoding, U+FFFD and C1 controls was looked for: the package 'ftfy' "
        "(pip install 'fullrank[data]') also finds damaged and mixed cases"
    }


# ---- mojibake -------------------------------------------------------------------------------------------------------

#: Characters that English and other ordinary texts hold beyond ASCII: alone they are no sign of mojibake, since every sequence of
#: it has at least one character from outside.
_ORDINARY = "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}‘’“”–—…•°£€¼½¾×÷≤≥≠"
_UNUSUAL = re.compile(f"[^\x00-\x7f{_ORDINARY}]")
#: Characters to either side of an unusual one that may belong to one of ftfy's patterns, the longest of which has seven.
_NEIGHBOURHOOD = 8

_REPLACEMENT = re.compile("\ufffd+")
_C1 = re.compile("[\x80-\x9f]+")
#: ASCII letters with a NUL after each: UTF-16 whose bytes were taken for characters.
_WIDE = re.compile("(?:[ -~]\x00){3,}")
#: The same bytes in the wrong order: each ASCII letter becomes U+xx00. Such ideographs in a row, three of them different, are no
#: words (box drawings and rows of one ideograph have such code points too).
_SWAPPED = re.compile("[\u2000" + "".join(chr(ord(letter) << 8) for letter in string.ascii_letters) + "]{4,}")
_FEWEST_SWAPPED = 3
#: What is left of a curly apostrophe that the target encoding lacks (`?`), or of one in Mac Roman or code page 437 read as
#: Windows-1252 (`Õ`, `Æ`), inside an English contraction. Signs behind it that are not prose make it a web address or a pattern.
_APOSTROPHE = re.compile(r"\?(?<=[A-Za-z]\?)(?=(?:t|s|re|ve|ll|d|m)(?![\w=&?/\\)|*+]))")
_MAC_APOSTROPHE = re.compile(r"[ÕÆ](?<=[A-Za-z].)(?=(?:t|s|re|ve|ll|d|m)\b)")
#: U+FFFD's bytes twice in GBK, and memory of Visual C++ debug builds read as GBK: never words.
_CHINESE_DEBRIS = re.compile("锟斤拷|烫烫烫|屯屯屯")
#: Quoted-printable (RFC 2045, section 6.7) of a UTF-8 sequence.
_QUOTED = re.compile("=[C-F][0-9A-F]=[89AB][0-9A-F](?:=[89A-F][0-9A-F])*")
#: Four letters of Latin-1's upper half in a row: no Latin orthography has such a word; Cyrillic, Greek or Hebrew read as it
#: has little else. Several words are asked for, in the case of words: a list of letters (`àáâãäå`, `ÄÖÜäöüß`) is none. (`ÜÝÞß`
#: are small letters of Greek.)
_ACCENTS_ONLY = re.compile("(?<![À-ÖØ-öø-ÿ])[À-ÖØ-öø-ÿ]{4,}")
_ACCENTED = re.compile("[À-ÖØ-öø-ÿ]")
#: Letters that stand together in both cases are a list of letters.
_FEWEST_CASE_PAIRS = 2
_WORD_OF_ACCENTS = re.compile("[À-ÖØ-Þ]?[ÜÝÞß-öø-ÿ]+|[À-ÖØ-Þ]+")
_FEWEST_FOREIGN_WORDS = 2

#: Legacy encodings that UTF-8 is mistaken for, the likelier first; the names are Python's.
_LEGACY = (
    "cp1252",
    "latin-1",
    "cp1251",
    "mac-roman",
    "cp437",
    "cp850",
    "cp1250",
    "iso8859-2",
    "cp1254",
    "cp1253",
    "cp1257",
)


class _Legacy(NamedTuple):
    """One legacy encoding: UTF-8 sequences as it shows them, and the byte of each of its characters."""

    name: str
    sequences: re.Pattern[str]
    bytes: dict[str, int]


@cache
def _legacies() -> tuple[re.Pattern[str], tuple[_Legacy, ...]]:
    """A first sieve for all of them, and the encodings."""
    legacies = []
    leads: set[str] = set()
    tails: set[str] = set()
    for name in _LEGACY:
        # Bytes that an encoding leaves undefined come out as C1 controls, as browsers do (WHATWG Encoding, section 9).
        shown = {code: bytes([code]).decode(name, "ignore") or chr(code) for code in range(0x80, 0x100)}

        def letters(first: int, last: int, shown: dict[int, str] = shown) -> str:
            return "[" + "".join(re.escape(shown[code]) for code in range(first, last + 1)) + "]"

        tail = letters(0x80, 0xBF)
        pattern = f"(?:{letters(0xC2, 0xDF)}{tail}|{letters(0xE0, 0xEF)}{tail}{{2}}|{letters(0xF0, 0xF4)}{tail}{{3}})+"
        legacies.append(_Legacy(name, re.compile(pattern), {char: code for code, char in shown.items()}))
        leads.update(shown[code] for code in range(0xC2, 0xF5))
        tails.update(shown[code] for code in range(0x80, 0xC0))
    sieve = "[" + re.escape("".join(sorted(leads))) + "][" + re.escape("".join(sorted(tails))) + "]"
    return re.compile(sieve), tuple(legacies)


#: Characters that a single mis-read sequence of three or four bytes may stand for: general punctuation, currencies, the trade
#: mark, arrows, operators, symbols and emoji. Others (ideographs, rare letters) are believed from two in a row on, since a letter
#: before a closing quote and an ellipsis can look like one of them.
_LONE_SYMBOL = re.compile(
    "[\u2010-\u203a\u20ac\u2122\u2190-\u21ff\u2200-\u22ff\u2600-\u27bf\ufb01\ufb02\ufeff\u200b-\u200d\U0001f300-\U0001faff]"
)
#: Characters that a single mis-read sequence of two bytes may stand for.
_LONE_LETTER = re.compile("[\xa0-\xff]|[\u0100-\u017f]")
#: What longer stretches may stand for: scripts and symbols in use.
_IN_USE = re.compile(
    "[\xa0-\u024f\u0300-\u036f\u0370-\u03ff\u0400-\u052f\u0531-\u058a\u05d0-\u05ea\u0600-\u06ff\u0900-\u0e7f\u10d0-\u10ff"
    "\u1200-\u137f\u1780-\u17ff\u1e00-\u1fff\u2000-\u206f\u20a0-\u20bf\u2100-\u27bf\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3"
    "\ufb01\ufb02\ufe0e\ufe0f\ufeff\uff00-\uffef\ufffd\U0001f000-\U0001faff]+"
)
_GREEK_OR_CYRILLIC = re.compile("[\u0370-\u052f]")
#: Frames drawn in a terminal are read as code page 437 only where they stand inside words.
_BOXES = re.compile("[\u2500-\u259f]+")
#: Signs that follow a root or another operator in formulas: not a letter read as Mac Roman.
_FORMULA = re.compile("[√≈¬ƒ][π∑∏∫Ω∂∞µ±≤≥°]")


class _Mojibake:
    """Finds it; ftfy's table is used where ftfy is installed (its patterns, not its repairs: texts are never changed)."""

    def __init__(self) -> None:
        self._unlikely: re.Pattern[str] | None = None
        try:
            from ftfy.badness import BADNESS_RE
        except ImportError:
            return
        self._unlikely = BADNESS_RE

    def look(self, text: str, plain: bool, ascii_only: bool) -> Spans:
        """`plain`: ASCII without control characters."""
        seen = Spans()
        if "?" in text:
            seen.extend(("apostrophe lost in an encoding", *match.span()) for match in _APOSTROPHE.finditer(text))
        if "=" in text:
            seen.extend(("quoted-printable bytes", *match.span()) for match in _QUOTED.finditer(text))
        if not plain and "\x00" in text:
            seen.extend(("UTF-16 read byte by byte", *match.span()) for match in _WIDE.finditer(text))
        if ascii_only or _UNUSUAL.search(text) is None:
            return seen
        seen.extend(("apostrophe lost in an encoding", *match.span()) for match in _MAC_APOSTROPHE.finditer(text))
        seen.extend(("replacement character U+FFFD", *match.span()) for match in _REPLACEMENT.finditer(text))
        swapped = (match for match in _SWAPPED.finditer(text) if len(set(match[0])) >= _FEWEST_SWAPPED)
        seen.extend(("UTF-16 with its bytes swapped", *match.span()) for match in swapped)
        seen.extend(("U+FFFD or freed memory read as GBK", *match.span()) for match in _CHINESE_DEBRIS.finditer(text))
        _look_for_misread(text, seen)
        words = (match for match in _ACCENTS_ONLY.finditer(text) if _WORD_OF_ACCENTS.fullmatch(match[0]))
        foreign = [match for match in words if list(match[0]) != sorted(match[0])]
        if len({match[0] for match in foreign}) >= _FEWEST_FOREIGN_WORDS:
            seen.extend(("another alphabet read as Latin-1", *match.span()) for match in foreign)
        seen.extend(("C1 controls", *match.span()) for match in _C1.finditer(text))
        if self._unlikely is not None:
            seen.extend(self._unlikely_in(text, self._unlikely))
        return seen

    def _unlikely_in(self, text: str, unlikely: re.Pattern[str]) -> Iterator[Span]:
        """ftfy's matches; in the neighbourhood of unusual characters only, since each match has one and the table is slow."""
        end = -1
        for unusual in _UNUSUAL.finditer(text):
            at = unusual.start()
            if at < end:
                continue
            start, end = max(end, at - _NEIGHBOURHOOD, 0), at + _NEIGHBOURHOOD
            while last := _UNUSUAL.search(text, end - _NEIGHBOURHOOD + 1, end):
                end = last.start() + _NEIGHBOURHOOD
            for match in unlikely.finditer(text, start, end):
                if not _is_letter_list(text, match):
                    yield "characters left by mis-decoding", *match.span()


def _is_letter_list(text: str, match: re.Match[str]) -> bool:
    """Whether letters stand for themselves, in phonetics (`œ`) or patterns (`[äöüÄÖÜß]`): there odd neighbours say nothing."""
    if match[0][0] in "Œœ" and match[0].isprintable() and match[0][1:].isascii():
        return True
    first, last = match.span()
    lowest, highest = max(first - _NEIGHBOURHOOD, 0), last + _NEIGHBOURHOOD
    while first > lowest and _ACCENTED.match(text, first - 1):
        first -= 1
    while last < highest and _ACCENTED.match(text, last):
        last += 1
    letters = set(text[first:last])
    return sum(letter.isupper() and letter.lower() in letters for letter in letters) >= _FEWEST_CASE_PAIRS


def _look_for_misread(text: str, seen: Spans) -> None:
    """Stretches that are UTF-8 when written in a legacy encoding; where several fit, the likeliest encoding is named."""
    sieve, legacies = _legacies()
    if sieve.search(text) is None:
        return
    for legacy in legacies:
        for match in legacy.sequences.finditer(text):
            try:
                decoded = bytes(map(legacy.bytes.__getitem__, match[0])).decode()
            except UnicodeDecodeError:
                continue  # overlong forms and surrogates: not UTF-8 after all
            if _believable(text, *match.span(), decoded, legacy.sequences):
                seen.add(f"UTF-8 read as {legacy.name}", *match.span())


def _believable(text: str, start: int, end: int, decoded: str, sequences: re.Pattern[str]) -> bool:
    """Whether somebody may have written `decoded` where text[start:end] stands, one of the `sequences` of a legacy encoding."""
    before, after = text[start - 1 : start], text[end : end + 1]
    in_word = (before.isascii() and before.isalpha()) or (after.isascii() and after.isalpha())
    if _BOXES.fullmatch(text, start, end):
        return in_word and _IN_USE.fullmatch(decoded) is not None
    if len(decoded) > 1:
        return _IN_USE.fullmatch(decoded) is not None
    if end - start > 2:
        return _LONE_SYMBOL.match(decoded) is not None
    if _LONE_LETTER.match(decoded) is None:
        return False
    if _FORMULA.match(text, start) and not (before.islower() and after.islower()):
        return False
    if text[start].isupper() and before.isascii() and before.isupper() and not after.islower():
        return False  # the end of a word in capitals, followed by a closing quote or sign
    if _GREEK_OR_CYRILLIC.match(text, start):
        # A letter before a quote in Greek or Russian text, unless all such letters are mis-read.
        return in_word or _GREEK_OR_CYRILLIC.search(sequences.sub("", text)) is None
    return in_word or (not decoded.isalpha() and (before.isdigit() or after.isdigit()))


# ---- hidden characters ----------------------------------------------------------------------------------------------

#: C0 controls but tab, line feed and carriage return, and DELETE.
_ASCII_CONTROLS = bytes(code for code in [*range(0x20), 0x7F] if code not in b"\t\n\r")

#: Unicode's Default_Ignorable_Code_Point (UCD, DerivedCoreProperties.txt), the bidirectional controls and other format characters
#: (general category Cf, less the visible number signs of Arabic and the layout controls of hieroglyphs), controls (C1 belongs to
#: mojibake), private use, noncharacters, and two signs that stand for nothing: U+FFFC and the blank Braille pattern.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ue000-\uf8ff\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffc\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)

_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
#: Scripts that join or stack letters, where (zero-width) joiners are spelling: Arabic to Mandaic, Brahmic scripts, Tibetan,
#: Burmese, Khmer, Mongolian (Unicode 16, sections 9.2, 12.1 and 23.2; RFC 5892, appendix A).
_JOINING = re.compile(
    "[\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1a20-\u1aaf\u1b00-\u1b7f\ua8e0-\ua8ff\ufb50-\ufdff\ufe70-\ufefc]"
)
#: Scripts written without spaces, where a zero-width space marks where a line may break (Unicode 16, section 23.2).
_UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf]")
#: Subdivision flags: black flag, three to six tag letters or digits, cancel tag (UTS #51, section 1.4.6).
_FLAG = re.compile("\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f")

_NAMES = {
    "\u200b": "zero-width space",
    "\u200c": "zero-width non-joiner",
    "\u200d": "zero-width joiner",
    "\u2060": "word joiner",
    "\ufeff": "byte order mark",
    "\u00ad": "soft hyphen",
    "\u200e": "left-to-right mark",
    "\u200f": "right-to-left mark",
    "\u061c": "Arabic letter mark",
}


def hidden_in(text: str) -> Iterator[Span]:
    """Characters that cannot be seen and that the text around them gives no reason for; neighbours of one sort as one span."""
    sort, first, end = "", 0, 0
    flags: list[tuple[int, int]] | None = None
    for match in _HIDDEN.finditer(text):
        at = match.start()
        char = match[0]
        if char >= "\U000e0020" and char <= "\U000e007f":
            if flags is None:
                flags = [flag.span() for flag in _FLAG.finditer(text)]
            if any(start < at < stop for start, stop in flags):
                continue
        elif _has_use(text, at, char):
            continue
        if at == end and end > first and _sort(char) == sort:
            end = at + 1
            continue
        if end > first:
            yield sort, first, end
        sort, first, end = _sort(char), at, at + 1
    if end > first:
        yield sort, first, end


def _sort(char: str) -> str:
    code = ord(char)
    if name := _NAMES.get(char):
        return f"{name} U+{code:04X}"
    if code < 0x20 or code == 0x7F:
        return f"control character U+{code:04X}"
    if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return "bidirectional control U+202A-202E, U+2066-2069"
    if 0xE0000 <= code <= 0xE007F:
        return "tag character U+E0000-E007F"
    if 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F:
        return "variation selector that selects nothing"
    if 0xE000 <= code <= 0xF8FF or 0xF0000 <= code <= 0xFFFFD or 0x100000 <= code <= 0x10FFFD:
        return "private-use character"
    name = unicodedata.name(char, "")
    return f"{name.lower()} U+{code:04X}" if name else "noncharacter or reserved code point"


def _has_use(text: str, at: int, char: str) -> bool:
    """Whether the character does something here that its script or emoji needs."""
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    code = ord(char)
    if code in (0x200C, 0x200D):
        if _JOINING.match(before) or (code == 0x200C and _JOINING.match(after)):
            return True
        return code == 0x200D and _is_pictograph(before) and _is_pictograph(after)
    if code == 0x200B:
        return _UNSPACED.search(text, max(at - 3, 0), at + 4) is not None
    if code in (0x200E, 0x200F, 0x061C):
        return _RIGHT_TO_LEFT.search(text) is not None
    if code in (0x202A, 0x202B, 0x202C) or 0x2066 <= code <= 0x2069:
        # Embeddings and isolates belong to right-to-left text when each is closed; overrides never do (Boucher and Anderson,
        # "Trojan Source", USENIX Security 2023: unclosed and overriding controls reorder what a reader sees).
        if "\u202d" in text or "\u202e" in text or _RIGHT_TO_LEFT.search(text) is None:
            return False
        opened = sum(map(text.count, "\u202a\u202b\u2066\u2067\u2068"))
        return opened == text.count("\u202c") + text.count("\u2069")
    if 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
        if not before or _HIDDEN.match(before) or before.isspace():
            return False
        if before.isascii():
            return before in "#*0123456789" and after == "\N{COMBINING ENCLOSING KEYCAP}"
        return before == "\N{INFORMATION SOURCE}" or not (before.isalpha() and ord(before) < 0x1000)
    if 0x180B <= code <= 0x180F:
        return "\u1800" <= before <= "\u18af"
    if code == 0x034F:
        return bool(before) and unicodedata.combining(before) > 0
    if code in (0x115F, 0x1160):
        return "\u1100" <= before <= "\u11ff" or "\u1100" <= after <= "\u11ff"
    if code in (0x17B4, 0x17B5):
        return "\u1780" <= before <= "\u17ff"
    if code == 0x2800:
        return re.search("[\u2801-\u28ff]", text) is not None  # part of a picture in Braille dots
    return False


def _is_pictograph(char: str) -> bool:
    """An emoji or the end of one: symbols, skin tones, the emoji variation selector; newer ones than Python's tables too."""
    return bool(char) and (char == "\ufe0f" or "\U0001f000" <= char <= "\U0001faff" or "\u2190" <= char <= "\u2bff")


# ---- letters of another alphabet ------------------------------------------------------------------------------------

#: Letters with the same shape as a Latin one: those of Unicode's confusables.txt (UTS #39) whose Latin prototype is one ASCII
#: letter and which common typefaces draw alike.
_CYRILLIC_LIKE_LATIN = "АВЕЅІЈКМНОРСТУХаеорсухѕіјһԁԛԝүҮ"
_GREEK_LIKE_LATIN = "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧο"
#: The Latin letters of that shape that mixed words use without intent least often: not S, I and J, which Russian lacks.
_LATIN_LIKE_CYRILLIC = "ABEKMHOPCTXYaeopcxy"

_WORD_WITH_CYRILLIC = re.compile("[A-Za-z]*[\u0400-\u052f][A-Za-z\u0400-\u052f]*")
_WORD_WITH_GREEK = re.compile(f"[A-Za-z]*[{_GREEK_LIKE_LATIN}][A-Za-z{_GREEK_LIKE_LATIN}]*")
_CYRILLIC_OR_TWIN = re.compile(f"[\u0400-\u052f{_GREEK_LIKE_LATIN}]")
_LATIN_WORD = re.compile("[A-Za-z]{2}")


def homoglyphs_in(text: str) -> Iterator[Span]:
    """Words of two alphabets where every letter of one of them has a twin in the other."""
    if _CYRILLIC_OR_TWIN.search(text) is None:
        return
    words = list(_WORD_WITH_CYRILLIC.finditer(text))
    genuine = any(not set(match[0]) <= set(_CYRILLIC_LIKE_LATIN) and not _LATIN_WORD.search(match[0]) for match in words)
    for match in words:
        word = match[0]
        cyrillic = {char for char in word if char > "\x7f"}
        latin = set(word) - cyrillic
        if cyrillic <= set(_CYRILLIC_LIKE_LATIN) and (latin or not genuine):
            # Without Latin letters beside it, it must at least stand in a text that has no Cyrillic of its own.
            if latin or _LATIN_WORD.search(text):
                yield "Cyrillic letter in Latin text", *match.span()
        elif latin and latin <= set(_LATIN_LIKE_CYRILLIC) and len(cyrillic) > len(latin):
            yield "Latin letter in a Cyrillic word", *match.span()
    for match in _WORD_WITH_GREEK.finditer(text):
        word = match[0]
        beside = text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]
        latin_letters = sum(char.isascii() for char in word)
        # One Latin letter with a Greek one is a formula; Greek letters without a twin beside it make it a Greek word.
        if latin_letters >= 3 and latin_letters < len(word) and not re.search("[\u0370-\u03ff]", beside):
            yield "Greek letter in a Latin word", *match.span()


# ---- control tokens and role markers --------------------------------------------------------------------------------

#: Markers of chat formats that are one token in the model they belong to. `<|name|>` and DeepSeek's full-width form cover ChatML,
#: Llama 3 and 4, Phi, Qwen, GPT-OSS (Harmony), Cohere and Granite; the rest are Mistral's, Llama 2's and Gemma's.
_MARKERS = (
    r"<[|｜][A-Za-z][A-Za-z0-9_▁ -]{1,40}[|｜]>",
    r"<(?:start|end)_of_turn>",
    r"<(?:bos|eos)>",
    r"\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|SYSTEM_PROMPT)\]",
    r"<</?SYS>>",
    r"</?(?:tool_call|tool_response)>",
)
#: A piece of each of them: plain searches for these are all that most texts cost.
_MARKER_SIGNS = ("<|", "<｜", "_turn>", "os>", "INST]", "TOOL", "SYS", "tool_")
#: What the models that have these write themselves, where it is meant.
_WRITTEN_BY_MODELS = re.compile(r"</?(?:tool_call|tool_response)>")

#: Stanford Alpaca's prompt, and its relatives, alone on a line.
_HEADING = re.compile(r"^#{2,3} ?(?:Instruction|Response|Input|Human|Assistant|User|System):[ \t]*$", re.MULTILINE)

#: Who speaks, as prompt formats without control tokens write it (Anthropic, Vicuna): capitals, or a word that no prose begins a
#: line with, and never the text's first word, which may be its subject.
_SPEAKER = re.compile(r"(?<=\n)[ \t]*(?:Human|Assistant|USER|ASSISTANT|SYSTEM):(?=\s|$)")

#: Who asks and who answers in a transcript, at the start of a line.
_ASKER = re.compile(r"^[ \t>*_]{0,4}(?:Human|User|HUMAN|USER|user|human)[*_]{0,2}:", re.MULTILINE)
_ANSWERER = re.compile(
    r"^[ \t>*_]{0,4}(?:Assistant|ASSISTANT|assistant|AI|Bot|BOT|ChatGPT|GPT|gpt|GPT-4)[*_]{0,2}:", re.MULTILINE
)
_ANSWERER_SIGNS = ("ssistant", "SSISTANT", "AI:", "AI*", "ot:", "ot*", "OT:", "GPT", "gpt")


class _Tokens:
    """Finds control tokens of the tokenizer given and markers of known formats."""

    def __init__(self, control_tokens: Sequence[str]) -> None:
        # A control token that is a bare word or white space would be found everywhere; as text it is a word.
        own = sorted(
            {token for token in control_tokens if len(token) > 2 and not token.isalnum() and token.strip()}, key=len, reverse=True
        )
        self._own = frozenset(own)
        self._pattern = re.compile("|".join([*map(re.escape, own), *_MARKERS]))
        covered = re.compile("|".join(_MARKERS))
        self._signs = (*_MARKER_SIGNS, *{_sign(token) for token in own if not covered.fullmatch(token)})

    def look(self, text: str, *, by_the_model: bool = False) -> Spans:
        seen = Spans()
        for sign in self._signs:
            if sign in text:
                for match in self._pattern.finditer(text):
                    if by_the_model and _WRITTEN_BY_MODELS.fullmatch(match[0]):
                        continue
                    what = f"control token {match[0]}" if match[0] in self._own else "marker of a chat format"
                    seen.add(what, *match.span())
                break
        if "s>" in text:
            seen.extend(_sentence_marks(text))
        if "##" in text:
            seen.extend(("heading of a prompt format", *match.span()) for match in _HEADING.finditer(text))
        if ":" in text:
            if "\n" in text:
                seen.extend(("role marker of a prompt format", *match.span()) for match in _SPEAKER.finditer(text))
            for sign in _ANSWERER_SIGNS:
                if sign in text:
                    asked, answered = list(_ASKER.finditer(text)), list(_ANSWERER.finditer(text))
                    if asked and answered:
                        seen.extend(("transcript inside one text", *match.span()) for match in asked + answered)
                    break
        return seen


def _sign(token: str) -> str:
    """A short piece of a token that is quickly looked for: many tokens share few of them."""
    return token[:3]


def _sentence_marks(text: str) -> Iterator[Span]:
    """`<s>` and `</s>` that are not HTML's strike-through, whose marks come in pairs, the opening one first."""
    marks = list(re.finditer("</?s>", text))
    if [match[0] for match in marks] != ["<s>", "</s>"] * (len(marks) // 2):
        yield from (("marker of a chat format", *match.span()) for match in marks)
