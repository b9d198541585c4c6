"""2:4 bases: read them, keep them packed, train above them, write them."""

from .layout import LayoutError
from .linear import Sparse24Linear


__all__ = ["LayoutError", "Sparse24Linear"]
