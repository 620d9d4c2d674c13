"""Foreign text: what an engine, a file or a child process says, made fit to be shown.

Everything that is printed, or written into a page, a JUnit file or JSON, goes through here at the
way out. No text can move the cursor, colour the terminal, begin a line, hide what stands beside it
or break a file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final
from unicodedata import bidirectional

MAX_SHOWN: Final = 10_000
"""Characters of one line, or of one message of an engine, that are kept."""
_ISOLATE: Final = "\u2068"
_POP: Final = "\u2069"
_SLACK: Final = 50
"""What it takes to say that a text was cut; such a text is not cut again."""
_ISOLATED: Final = re.compile(f"({_ISOLATE}[^{_ISOLATE}{_POP}]*{_POP})")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a question after the name that was meant, if one is near.

    Parameters
    ----------
    name : str
        What was given.
    names : iterable of str
        What there is.

    Returns
    -------
    str
        With a space before it; empty when nothing is near.

    Examples
    --------
    >>> nearest("pr9575", ["pr9757", "balanced"]), nearest("x", ["pr9757"])
    (' Did you mean pr9757?', '')
    """
    found = get_close_matches(name, [*names], n=1)
    return f" Did you mean {found[0]}?" if found else ""


def bounded(text: str, limit: int = MAX_SHOWN) -> str:
    """Return a text, cut where it is too long; its end says how much is missing.

    Parameters
    ----------
    text : str
        Any text.
    limit : int
        Characters that are kept.

    Returns
    -------
    str
        At most 50 characters more than `limit`.

    Examples
    --------
    >>> bounded("x" * 200, limit=4)
    'xxxx ... and 196 more characters'
    """
    if len(text) <= limit + _SLACK:
        return text
    return f"{text[:limit]} ... and {len(text) - limit:,} more characters"


def shown(text: str, limit: int = MAX_SHOWN) -> str:
    r"""Return a foreign text as one line that shows no more than itself.

    What is no printable character is written as Python would: control characters, ends of lines,
    direction overrides, surrogates. Words that run from right to left are isolated, so that they
    turn nothing around beside them. A second time changes nothing.

    Parameters
    ----------
    text : str
        Any text.
    limit : int
        Characters of it that are kept; see `bounded`.

    Returns
    -------
    str
        Printable characters, and isolates in pairs.

    Examples
    --------
    >>> shown("\x1b[31mred\nPASS")
    '\\x1b[31mred\\nPASS'
    >>> shown("rank \u05d0 1") == "rank \u2068\u05d0\u2069 1"
    True
    """
    text = bounded(text, limit)
    if text.isascii() and text.isprintable():
        return text
    parts = _ISOLATED.split(text)
    return "".join(
        _ISOLATE + _escaped(part[1:-1]) + _POP if place % 2 else _isolated(_escaped(part))
        for place, part in enumerate(parts)
    )


def shown_lines(lines: Iterable[str]) -> str:
    r"""Return lines, each as `shown` has it, as one text.

    Examples
    --------
    >>> shown_lines(["one", "two\n"])
    'one\ntwo\\n'
    """
    return "\n".join(map(shown, lines))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _isolated(text: str) -> str:
    """Put each stretch from one right-to-left character to another between isolates."""
    found, since, last = "", 0, None
    for at, character in enumerate(text):
        direction = bidirectional(character)
        if direction in ("R", "AL", "AN"):
            if last is None:
                found, since = found + text[since:at] + _ISOLATE, at
            last = at
        elif direction == "L" and last is not None:
            found, since, last = found + text[since : last + 1] + _POP, last + 1, None
    if last is not None:
        found, since = found + text[since : last + 1] + _POP, last + 1
    return found + text[since:]


def shown_json(data: bytes) -> bytes:
    r"""Return JSON in which every character that is not printable is an escape; it means the same.

    Parameters
    ----------
    data : bytes
        JSON, as UTF-8; line feeds between values stay.

    Returns
    -------
    bytes
        JSON that any terminal can be shown.

    Examples
    --------
    >>> shown_json('"\u202e\u00e9"'.encode()).decode() == '"\\u202e\u00e9"'
    True
    """
    if data.isascii() and b"\x7f" not in data:
        return data
    return "".join(c if c.isprintable() or c == "\n" else _code(c) for c in data.decode()).encode()


def _code(character: str) -> str:
    """The escape of a character in a JSON string: two of them beyond 16 bits."""
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def without_surrogates(value: object) -> object:
    """Return what JSON can hold with lone surrogates, which no UTF-8 has, as escapes in text."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case list():
            return [without_surrogates(one) for one in value]
        case dict():
            return {without_surrogates(key): without_surrogates(one) for key, one in value.items()}
    return value


def shell_command(words: Iterable[str]) -> str:
    r"""Return a command as a shell reads it, in printable ASCII.

    Parameters
    ----------
    words : iterable of str
        The program and its arguments.

    Returns
    -------
    str
        One line. Words with other characters are quoted as bash, zsh and POSIX 2024 have it.

    Examples
    --------
    >>> print(shell_command(["cat", "my file", "\x1b[1m"]))
    cat 'my file' $'\033[1m'
    """
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if word.isascii() and word.isprintable():
        return shlex.quote(word)
    quoted = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b"'\\" else f"\\{byte:03o}"
        for byte in b"".join(map(_bytes, word))
    )
    return f"$'{quoted}'"


def _bytes(character: str) -> bytes:
    """The bytes of a character; of half a character those that the system gave it for."""
    from_a_byte = "\udc80" <= character <= "\udcff"
    return character.encode(errors="surrogateescape" if from_a_byte else "surrogatepass")
