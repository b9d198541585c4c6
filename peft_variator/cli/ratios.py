"""Compression ratios as they are typed."""

from __future__ import annotations


__all__ = ["parse_ratios"]


def parse_ratios(text: str) -> list[int]:
    """`"2,4,8"` as numbers, each of them once.

    Raises:
        ValueError: a part is no whole number.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--ratios is {text!r}; give whole numbers with commas between them, e.g. 2,4,8.")
    return list(dict.fromkeys(int(part) for part in parts))
