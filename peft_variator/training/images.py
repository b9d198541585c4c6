"""A folder of images as training examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import load_image


__all__ = ["ImageFolder"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class ImageFolder(Dataset[dict[str, Tensor]]):
    """The images in a folder and the folders in it, sorted by path, read when they are asked for.

    Args:
        folder: the folder.
        processor: the model's image processor.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: there is no image in it.
    """

    def __init__(self, folder: str | Path, processor: Any) -> None:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"There is no folder {str(folder)!r}. Vision models train on a folder of images.")
        self.processor = processor
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(f"There is no image in {str(folder)!r}. Known are {', '.join(sorted(SUFFIXES))}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The image of an index as the model takes it: `pixel_values` of shape `(channels, height, width)`."""
        image = load_image(str(self.paths[index]))
        return {"pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0]}
