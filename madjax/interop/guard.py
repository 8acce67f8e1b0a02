"""How much of other people's files may stand in a message, and unfold into memory."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

_LENGTH = 200
# twice what dSprites needs, an npz of 0s and 1s that unfolds about 120-fold; deflate could 1,032-fold
_FOLD = 256
_FLOOR = 2**28  # bytes that any machine has, so that a few plain images may be ever so small


class Refused(ValueError):
    """An error that is told in one line, with the argument that it is about."""


def shown(value: Any) -> str:
    r"""Text of a file, or an error, as it may stand in a message: one short line, no control characters.

    >>> print(shown("a\nb"), len(shown("a" * 999)))
    a\nb 200
    """
    text = str(value) or (type(value).__name__ if isinstance(value, Exception) else "")
    return printable(text[: _LENGTH + 1].replace("\\", "\\\\"), _LENGTH)


def printable(text: str, length: int) -> str:
    """The text without characters that move the cursor, `length` at most; what was `shown` in it stays as it is."""
    # format characters are not printable either, such as those that turn the direction of what follows
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: length + 1])
    return safe if len(safe) <= length else f"{safe[: length - 3]}..."


def check_unfolded(where: str, size: int, held: int) -> None:
    """Stops before `held` bytes of a file turn into more than a data set's could.

    Raises:
      Refused: beginning with `where`.
    """
    if size > max(_FLOOR, _FOLD * held):
        raise Refused(f"{where} unfolds from {held} bytes to {size}, wanted at most {_FOLD} times as many, or {_FLOOR}")


def check_text(array: np.ndarray) -> None:
    """NumPy keeps text as 32-bit numbers, and fails in ways of its own once one that is no character is looked at.

    Raises:
      Refused: where there is such a one.
    """
    if array.dtype.kind == "U":
        codes = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
        if (codes > sys.maxunicode).any():
            raise Refused(f"text of {array.dtype} holds what is no character")
