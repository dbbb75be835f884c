"""What a check finds: all is well, or what is wrong and what to type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor; `status` is ok, warn (it works, but something is lost) or FAIL (something will not)."""

    status: str
    says: str
    fix: str = ""


def ok(says: str) -> Finding:
    """All is well; `says` is what there is."""
    return Finding("ok", says)


def warn(says: str, fix: str) -> Finding:
    """It works, but something is lost."""
    return Finding("warn", says, fix)


def fail(says: str, fix: str) -> Finding:
    """Something that this repository does will not work."""
    return Finding("FAIL", says, fix)


def some(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
