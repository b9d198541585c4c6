"""From hidden states to one vector a text, as the folder of a sentence-transformers model says it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor


__all__ = ["POOLINGS", "EmbeddingRecipe", "check_pooling", "pool", "read_recipe"]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden, mask.cumsum(1) * mask)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, float("-inf")).amax(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.squeeze(-1).argmax(1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.shape[1] - 1 - mask.squeeze(-1).flip(1).argmax(1))


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places]


# The names are those of sentence-transformers.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "max": _max,
    "lasttoken": _last,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
}


def check_pooling(pooling: str) -> str:
    """Give back the name of a pooling.

    Raises:
        ValueError: there is none of this name.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not known; choose one of {', '.join(POOLINGS)}.")
    return pooling


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector for each text, shape (batch, d).

    Args:
        hidden: hidden states, shape (batch, length, d).
        attention_mask: 1 for real tokens, 0 for padding, shape (batch, length), on either side.
        pooling: a name in `POOLINGS`.
    """
    return POOLINGS[pooling](hidden, attention_mask.unsqueeze(-1).to(hidden.dtype))


@dataclass(frozen=True)
class EmbeddingRecipe:
    """How a model's hidden states become an embedding.

    Args:
        poolings: names in `POOLINGS`; the vectors of several are joined.
        normalize: whether it is scaled to length 1.
        max_length: most tokens of a text; `None`: as many as the model has positions.
        prompt: put before every text.
        unknown: what the folder does with it besides, which only sentence-transformers can.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = True
    max_length: int | None = None
    prompt: str = ""
    unknown: tuple[str, ...] = ()


def read_recipe(model: str) -> EmbeddingRecipe:
    """What the folder of a model says about embeddings; the mean, normalised, where it says nothing.

    Args:
        model: folder, or name on the Hub of a model that was downloaded before. Nothing is downloaded.
    """
    modules = _read(model, "modules.json")
    if not isinstance(modules, list):
        return EmbeddingRecipe()
    poolings: tuple[str, ...] = ()
    normalize, unknown = False, []
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        settings = _read(model, f"{module['path']}/config.json".lstrip("/")) or {}
        if kind == "Pooling":
            poolings = _poolings(settings)
            unknown += [] if settings.get("include_prompt", True) else ["Pooling(include_prompt=False)"]
            unknown += [name for name in poolings if name not in POOLINGS]
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            unknown.append(kind)
    general = _read(model, "config_sentence_transformers.json") or {}
    return EmbeddingRecipe(
        poolings=poolings or ("mean",),
        normalize=normalize,
        max_length=(_read(model, "sentence_bert_config.json") or {}).get("max_seq_length"),
        prompt=(general.get("prompts") or {}).get(general.get("default_prompt_name")) or "",
        unknown=tuple(unknown),
    )


def _poolings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The poolings of a folder; before version 5.5 of sentence-transformers there was one flag for each."""
    named = settings.get("pooling_mode")
    if named is not None:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for flag, name in _FLAGS.items() if settings.get(flag))


_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _read(model: str, name: str) -> Any:
    path: Any = Path(model, name)
    if model and not path.is_file() and not Path(model).exists() and model.count("/") <= 1:
        path = try_to_load_from_cache(model, name)
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))
