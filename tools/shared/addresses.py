"""Addresses as they may be shown."""

from __future__ import annotations

import re


def masked(text: str) -> str:
    """Without the user and password of addresses, for what others may read."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)
