"""A small, fixed sample of a data set."""

from __future__ import annotations

from itertools import islice
from typing import Any

from transformers.trainer_utils import has_length


__all__ = ["sample_examples"]


def sample_examples(dataset: Any, count: int) -> list[Any]:
    """Up to `count` examples, spread evenly over the data set, or its first ones if its length is not known.

    Args:
        dataset: a map-style or iterable data set.
        count: number of examples.
    """
    if not has_length(dataset):
        return list(islice(dataset, count))
    count = min(count, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]
