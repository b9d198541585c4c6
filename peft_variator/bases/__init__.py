"""2:4 bases: read them, keep them packed, train above them, write them.

Importing the package makes transformers know packed models, see `Sparse24Config`, and SparseLoRA packed layers.
"""

from ..model_files import CheckpointError
from .config import Sparse24Config
from .convert import pack_checkpoint, unpack_checkpoint
from .linear import Sparse24Linear, describe_paths, register_packed_layout
from .merge import MergeReport, merge_checkpoint
from .packing import LayoutError
from .quantizer import Sparse24Quantizer, load_base, register, save_base


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
