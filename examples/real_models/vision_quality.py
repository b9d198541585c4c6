"""What a vision encoder's features are good for: a linear probe, and how close they stay to the base's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from texts import cifar10, photographs
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


__all__ = ["cifar10_probe", "photograph_cosine", "pixels"]

# ImageNet's, with which DINOv2 was trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Sides in pixels, multiples of 14. CIFAR's images have 32, so little is lost at 112.
CIFAR_SIDE, PHOTOGRAPH_SIDE = 112, 224
BATCH = 32


def pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """The middle squares of images, normalised, of shape `(images, 3, side, side)`."""
    squares = []
    for image in images:
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        squares.append(np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255)
    return ((torch.from_numpy(np.stack(squares)) - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


@torch.inference_mode()
def _class_tokens(model: nn.Module, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
    parts = [
        model(pixels(images[start : start + BATCH], CIFAR_SIDE)).last_hidden_state[:, 0].float()
        for start in range(0, len(images), BATCH)
    ]
    return torch.cat(parts).numpy()


def cifar10_probe(model: nn.Module, data: Path, limit: int | None) -> dict[str, Any]:
    """Accuracy, in percent, of logistic regression on the class token of CIFAR-10's images.

    Args:
        model: vision encoder in evaluation mode.
        data: the data folder.
        limit: images to train on and to test on at most, spread over the classes.
    """
    sets = []
    for split in ("train", "test"):
        images, labels = cifar10(data, split)
        step = max(1, len(images) // limit) if limit else 1
        sets.append((_class_tokens(model, images[::step][:limit]), labels[::step][:limit]))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(*sets[0])
    return {"accuracy": 100 * classifier.score(*sets[1]), "train": len(sets[0][1]), "test": len(sets[1][1])}


@torch.inference_mode()
def photograph_cosine(model: nn.Module, base: nn.Module, data: Path, limit: int | None) -> dict[str, Any]:
    """Mean cosine of class tokens and of patches with the base's on photographs that are not trained on."""
    images = photographs(data)[1][:limit]
    classes, patches = [], []
    for start in range(0, len(images), BATCH):
        batch = pixels(images[start : start + BATCH], PHOTOGRAPH_SIDE)
        expected = base(batch).last_hidden_state.float()
        found = expected if model is base else model(batch).last_hidden_state.float()
        cosines = cosine_similarity(found, expected, dim=-1)
        classes.append(cosines[:, 0])
        patches.append(cosines[:, 1:].mean(1))
    return {
        "class_cosine": torch.cat(classes).mean().item(),
        "patch_cosine": torch.cat(patches).mean().item(),
        "images": len(images),
    }
