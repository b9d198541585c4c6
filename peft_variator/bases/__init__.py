"""2:4 bases: read them, keep them packed, train above them, write them.

Importing the package makes transformers know packed models, see `Sparse24Config`, and SparseLoRA packed layers.
"""

from .adapters import register_packed_layout
from .checkpoint import CheckpointError
from .config import Sparse24Config
from .convert import pack_checkpoint, unpack_checkpoint
from .layout import LayoutError
from .linear import Sparse24Linear
from .load import load_base
from .merge import MergeReport, merge_checkpoint
from .paths import describe_paths
from .quantizer import Sparse24Quantizer, register
from .save import save_base


__all__ = [
    "CheckpointError",
    "LayoutError",
    "MergeReport",
    "Sparse24Config",
    "Sparse24Linear",
    "Sparse24Quantizer",
    "describe_paths",
    "load_base",
    "merge_checkpoint",
    "pack_checkpoint",
    "save_base",
    "unpack_checkpoint",
]

register()
register_packed_layout()
