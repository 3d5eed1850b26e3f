"""Checks of configuration fields. ConfigError says which field, what was expected and what it got."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kvtoolkit.arrays.types import as_int
from kvtoolkit.errors import ConfigError

_NBYTES = re.compile(r"\s*(\d{1,1000}(?:\.\d{1,1000})?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


def require_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A value as an ``int``; ConfigError unless it is an integer in a range."""
    found = as_int(value)
    if found is None or found < low or (high is not None and found > high):
        bound = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}: expected an int {bound}, got {value!r}")
    return found


def settle_int(config: Any, name: str, low: int, high: int | None = None, prefix: str = "") -> None:
    """Make a field of a frozen dataclass an ``int``; ConfigError, with ``prefix`` before the name, as `require_int`."""
    object.__setattr__(config, name, require_int(prefix + name, getattr(config, name), low, high))


def require_one_of(name: str, value: Any, expected: tuple[str, ...]) -> None:
    """ConfigError unless a value is one of some texts."""
    if value not in expected:
        raise ConfigError(
            f"{name}: expected one of {', '.join(expected)}, got {value!r}{did_you_mean(value, expected)}"
        )


def require_known(values: Mapping[str, Any], known: tuple[str, ...], prefix: str = "") -> None:
    """ConfigError unless all keys of a mapping are known; ``prefix`` begins the message."""
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key!r}: expected one of {', '.join(known)}{did_you_mean(key, known)}")


def did_you_mean(value: Any, expected: Iterable[str]) -> str:
    """The end of an error message: the expected text that is closest to a value; empty if none is close."""
    import difflib  # only for the message

    close = difflib.get_close_matches(value, list(expected), 1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_nbytes(value: int | str, name: str = "memory") -> int:
    """Bytes from an int or a text such as ``"512 MiB"`` or ``"1.5GB"`` (decimal units without the i)."""
    if (nbytes := as_int(value)) is not None:
        if nbytes <= 0:
            raise ConfigError(f"{name}: expected a positive number of bytes, got {value}")
    else:
        match = _NBYTES.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ConfigError(f"{name}: expected bytes or a text such as '512 MiB', got {value!r:.80}")
        from fractions import Fraction

        number, prefix, binary = match.groups()
        base = 1024 if binary else 1000
        nbytes = int(Fraction(number) * base ** " KMGT".index(prefix.upper() or " "))
    if nbytes >= 1 << 63:
        # the number itself may be too long to be printed
        raise ConfigError(f"{name}: expected fewer than 2**63 bytes, got at least 2**{nbytes.bit_length() - 1}")
    return nbytes
