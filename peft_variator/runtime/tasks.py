"""The model of texts inside of what is served, and what can be asked of it: one class a task.

Texts go in, and one answer a text comes out, whichever batch it ran in.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import normalize as to_length_one
from torch.nn.functional import pad
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..models import has_decoder, head_of
from ..pooling import pool
from ..profiling import count_positions
from ..sentence_folder import read_recipe
from ..tuners.variator.layer import plugin_layers


__all__ = [
    "Classifications",
    "Classify",
    "Embed",
    "EmbedSentences",
    "Embeddings",
    "Prefill",
    "Prefilled",
    "Rerank",
    "Scores",
    "Served",
    "Task",
    "check_no_decoder",
    "find_transformer",
    "has_plugin",
    "is_causal",
    "is_one_of",
    "is_sentence_transformer",
    "unwrap",
]

Encoded = dict[str, list[int]]
"""One text: what the tokenizer gives, without padding, always with `input_ids`."""


def unwrap(model: nn.Module) -> nn.Module:
    """What a PeftModel was put around, with the plugin in it; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether a model is a `SentenceTransformer`, also inside of a PeftModel.

    Raises:
        TypeError: it is another chain of modules, such as a `CrossEncoder`.
    """
    inside, library = unwrap(model), sys.modules.get("sentence_transformers")
    if not isinstance(inside, nn.Sequential):
        return False
    if library is None or not isinstance(inside, library.SentenceTransformer):
        raise TypeError(
            f"{type(inside).__name__} is a chain of modules that is not served as it is. Give the model of "
            "transformers inside of it, with its tokenizer: Engine(encoder.transformers_model, encoder.tokenizer) for "
            "a CrossEncoder, whose scores are then logits."
        )
    return True


def find_transformer(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside of a PeftModel or a SentenceTransformer.

    Raises:
        ValueError: there is none, it takes no text, or it is an encoder-decoder that is neither a classifier nor
            inside of a SentenceTransformer.
    """
    found = next((module for module in unwrap(model).modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no model of transformers in it. Give one that does.")
    if found.main_input_name != "input_ids":
        raise ValueError(f"{type(found).__name__} takes {found.main_input_name}; only models of text are served.")
    # What a SentenceTransformer makes of the decoder's states is its own affair.
    if not isinstance(unwrap(model), nn.Sequential) and not _is_classifier(found):
        check_no_decoder(found)
    return found


def check_no_decoder(model: PreTrainedModel) -> None:
    """Raise if a model is an encoder-decoder, whose hidden states are its decoder's and no text's.

    Raises:
        ValueError: it is.
    """
    if has_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder. Serve its encoder alone, e.g. a T5EncoderModel."
        )


def is_one_of(mapping: Mapping[Any, Any], model: PreTrainedModel) -> bool:
    """Whether a model has the head that an automatic class of transformers, whose mapping this is, would give it."""
    return type(model.config) in mapping and isinstance(model, mapping[type(model.config)])


def _is_classifier(model: PreTrainedModel) -> bool:
    return is_one_of(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, model)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a model predicts next tokens, so that it is asked for a prefill."""
    return is_one_of(MODEL_FOR_CAUSAL_LM_MAPPING, model)


def has_plugin(model: nn.Module) -> bool:
    """Whether there is a Variator plugin whose ratio can be chosen."""
    return next(iter(plugin_layers(model)), None) is not None


@dataclass(frozen=True)
class Embeddings:
    """What `embed` gives.

    Args:
        embeddings: float32 on the CPU, shape (n, d).
        ratios: the compression ratio k of each text.
        lengths: tokens of each text, special ones included.
        late: whether each answer came after its deadline.
    """

    embeddings: Tensor
    ratios: list[int]
    lengths: list[int]
    late: list[bool]


@dataclass(frozen=True)
class Classifications:
    """What `classify` gives: `logits`, float32 on the CPU, shape (n, labels); the rest as in [`Embeddings`]."""

    logits: Tensor
    ratios: list[int]
    lengths: list[int]
    late: list[bool]


@dataclass(frozen=True)
class Scores:
    """What `rerank` gives: `scores`, float32 on the CPU, shape (n,), larger for documents that fit better."""

    scores: Tensor
    ratios: list[int]
    lengths: list[int]
    late: list[bool]


@dataclass(frozen=True)
class Prefilled:
    """What `prefill` gives.

    Args:
        logits: those of the last position of each prompt, float32 on the CPU, shape (n, vocabulary).
        past_key_values: the cache of all prompts, padded on the left to the longest, on the model's device.
        attention_mask: 1 for what the cache holds of each prompt, 0 for padding, shape (n, longest).
        ratios: the compression ratio k of each prompt: its row of the cache was made at this k, all of it.
        lengths: tokens of each prompt.
        late: whether each answer came after its deadline.
    """

    logits: Tensor
    past_key_values: DynamicCache
    attention_mask: Tensor
    ratios: list[int]
    lengths: list[int]
    late: list[bool]


@dataclass(frozen=True)
class Served:
    """A model and its tokenizer, and the lock that the tokenizer needs: its settings are not made for threads."""

    model: nn.Module
    inner: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Served:
        """Find the model of transformers, and the most tokens that it, its tokenizer and the user allow."""
        inner = find_transformer(model)
        # Tokenizers that have no limit say 10 ** 30, which they do not take themselves.
        most = [count_positions(inner.config), tokenizer.model_max_length, max_length]
        known = [each for each in most if each is not None and each <= sys.maxsize]
        return cls(model, inner, tokenizer, min(known, default=None))

    def encode(self, *columns: list[str], max_length: int | None = None) -> list[Encoded]:
        """Tokens of each text, or of each pair of texts, cut to `max_length` with a warning; `None`: not cut."""
        cutting = {} if max_length is None else {"truncation": True, "max_length": max_length}
        with self.lock:
            found = self.tokenizer(*columns, return_attention_mask=False, verbose=False, **cutting)
        if any(each.overflowing for each in found.encodings or ()):  # `None` of tokenizers in Python
            _warn_about_cut(cast(int, max_length))
        taken = inspect.signature(type(self.inner).forward).parameters
        kept = {name: rows for name, rows in found.items() if name in taken}
        return [dict(zip(kept, row, strict=True)) for row in zip(*kept.values(), strict=True)]

    @property
    def pad_id(self) -> int | None:
        """The id that the model takes for padding; `None`: it knows none."""
        pad_id: int | None = self.inner.config.get_text_config().pad_token_id
        return None if pad_id is None or pad_id < 0 else pad_id

    def padded(self, texts: Sequence[Encoded], side: str = "right") -> dict[str, Tensor]:
        """A batch on the model's device, with its attention mask."""
        # The model's own: classifiers on causal models read the last token that is not it, whatever the mask says.
        pad_id = self.tokenizer.pad_token_id or 0 if self.pad_id is None else self.pad_id
        filling = {"input_ids": pad_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return pad_batch(texts, filling, side, self.inner.device)


def pad_batch(
    texts: Sequence[Encoded], filling: Mapping[str, int], side: str, device: torch.device
) -> dict[str, Tensor]:
    """Texts as tensors of shape (batch, longest), and `attention_mask`: 1 for their tokens, 0 for padding."""
    lengths = [len(text["input_ids"]) for text in texts]
    longest = max(lengths)

    def column(rows: Sequence[list[int]], value: int) -> Tensor:
        fill = [[value] * (longest - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([row + more if side == "right" else more + row for row, more in pairs], device=device)

    batch = {name: column([text[name] for text in texts], filling.get(name, 0)) for name in texts[0]}
    return batch | {"attention_mask": column([[1] * length for length in lengths], 0)}


class Task:
    """One kind of question. What it gives for a text does not depend on the batch that the text runs in.

    Raises:
        ValueError: when it is made: the model cannot do this.
    """

    served: Served

    def encode(self, texts: list[str], **options: Any) -> list[Encoded]:
        """Tokens of each text, in the thread of whoever asks.

        Raises:
            ValueError: a text can't be taken.
        """
        raise NotImplementedError

    def run(self, texts: Sequence[Encoded]) -> list[Any]:
        """One forward over a batch, at the ratio that is chosen: an answer for each text."""
        raise NotImplementedError

    def assemble(self, answers: list[Any], **about: Any) -> Any:
        """The answers to one request, in its order."""
        raise NotImplementedError


class Embed(Task):
    """Embeddings of a model of transformers.

    Args:
        served: the model.
        pooling: a name in `POOLINGS`; `None`: as the model's folder says, else `"mean"`.
        normalize: whether vectors have length 1; `None`: as the folder says, else yes.
    """

    def __init__(self, served: Served, pooling: str | None, normalize: bool | None) -> None:
        check_no_decoder(served.inner)  # of a classifier, which `find_transformer` lets pass
        recipe = read_recipe(served.inner.config.name_or_path)
        if recipe.unknown and (pooling is None or normalize is None):
            raise ValueError(
                f"{served.inner.config.name_or_path} makes its embeddings with {', '.join(recipe.unknown)}, which "
                "only sentence-transformers can: give the Engine a SentenceTransformer, or name pooling and normalize."
            )
        self.served = served
        self.poolings = recipe.poolings if pooling is None else (pooling,)
        # As sentence-transformers does: its modules' scaling comes before the cut, that which is asked for after it.
        self.normalizes_first, self.normalize = recipe.normalize and normalize is None, bool(normalize)
        self.prompt, self.truncate_dim = recipe.prompt, recipe.truncate_dim
        most = [each for each in (served.max_length, recipe.max_length) if each is not None]
        self.max_length = min(most, default=None)
        width = served.inner.config.get_text_config().hidden_size * len(self.poolings)
        self.width = min(width, self.truncate_dim or width)
        # Without the head, which would compute logits of every token for nothing.
        self.has_body = served.inner.base_model is not served.inner
        # Some models name none, and a head keeps its hidden states to itself unless it is asked for them.
        self.asks = {"output_hidden_states": True} if not self.has_body and head_of(served.inner) else {}

    def encode(self, texts: list[str], **options: Any) -> list[Encoded]:
        encoded = self.served.encode([self.prompt + text for text in texts], max_length=self.max_length)
        return _checked_not_empty(encoded)

    def run(self, texts: Sequence[Encoded]) -> list[Tensor]:
        batch = self.served.padded(texts)
        model = self.served.inner.base_model if self.has_body else self.served.model
        outputs = model(**batch, **self.asks)
        hidden = outputs.hidden_states[-1] if self.asks else outputs.last_hidden_state
        vectors = torch.cat([pool(hidden, batch["attention_mask"], name) for name in self.poolings], dim=-1)
        vectors = vectors.float()
        vectors = (to_length_one(vectors, dim=-1) if self.normalizes_first else vectors)[:, : self.truncate_dim]
        return list((to_length_one(vectors, dim=-1) if self.normalize else vectors).cpu())

    def assemble(self, answers: list[Tensor], **about: Any) -> Embeddings:
        return Embeddings(_stacked(answers, self.width), **about)


class EmbedSentences(Task):
    """Embeddings of a `SentenceTransformer`, as its `encode` gives them.

    Args:
        model: a SentenceTransformer.
        pooling: instead of its own; `None`: its own.
        normalize: whether vectors have length 1; `None`: as its modules do.
    """

    def __init__(self, model: Any, pooling: str | None, normalize: bool | None) -> None:
        self.sentences = cast(Any, unwrap(model))
        self.served = Served.of(model, self.sentences.tokenizer, None)
        self.pooling = pooling
        self.normalize = normalize
        self.prompt = (self.sentences.prompts or {}).get(self.sentences.default_prompt_name or "") or None
        self.width = self.sentences.get_embedding_dimension()
        # A convolution over tokens sees the padding beside them.
        self.one_by_one = any(type(module).__name__ == "CNN" for module in self.sentences)

    def encode(self, texts: list[str], **options: Any) -> list[Encoded]:
        with self.served.lock:
            features = self.sentences.preprocess(texts, prompt=self.prompt)
        shape = features["input_ids"].shape
        rest = {name: value for name, value in features.items() if name not in ("attention_mask",)}
        columns = {name: value for name, value in rest.items() if isinstance(value, Tensor) and value.shape == shape}
        shared = {name: value for name, value in rest.items() if name not in columns}
        encoded: list[Any] = []
        for row, mask in enumerate(features["attention_mask"].bool()):
            encoded.append(_SentenceEncoding({name: value[row][mask].tolist() for name, value in columns.items()}))
            encoded[-1].shared = shared
        self._tell_if_cut(texts, encoded)
        return _checked_not_empty(encoded)

    def _tell_if_cut(self, texts: list[str], encoded: Sequence[Encoded]) -> None:
        """Look again at texts that are as long as the model takes; the library does not say which it has cut."""
        most: int | None = self.sentences.max_seq_length
        if most is None:
            return
        whole = [
            (self.prompt or "") + text
            for text, tokens in zip(texts, encoded, strict=True)
            if len(tokens["input_ids"]) >= most
        ]
        if whole:
            with self.served.lock:
                found = self.served.tokenizer(whole, truncation=False, verbose=False)["input_ids"]
            if max(map(len, found)) > most:
                _warn_about_cut(most)

    def run(self, texts: Sequence[Encoded]) -> list[Tensor]:
        if self.one_by_one and len(texts) > 1:
            return [vector for text in texts for vector in self.run([text])]
        shared = texts[0].shared  # type: ignore[attr-defined]
        side = getattr(self.served.tokenizer, "padding_side", "right")
        features: dict[str, Any] = {**shared, **self.served.padded(texts, side)}
        mask = features["attention_mask"]
        as_they_are = self.pooling is None and self.normalize is None
        features = self.sentences(features) if as_they_are else self._through_modules(features, mask)
        vectors = features["sentence_embedding"][:, : self.sentences.truncate_dim]
        vectors = vectors.float()
        return list((to_length_one(vectors, dim=-1) if self.normalize else vectors).cpu())

    def _through_modules(self, features: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        for module in self.sentences:
            if isinstance(module, Pooling) and self.pooling is not None:
                pooled = mask if module.include_prompt else _without_prompt(mask, features.get("prompt_length"))
                features["sentence_embedding"] = pool(features["token_embeddings"], pooled, self.pooling)
            elif not isinstance(module, Normalize) or self.normalize is None:
                features = module(features)
        return features

    def assemble(self, answers: list[Tensor], **about: Any) -> Embeddings:
        return Embeddings(_stacked(answers, self.width or 0), **about)


def _without_prompt(mask: Tensor, length: Any) -> Tensor:
    """A mask of shape `(batch, length)` without the first `length` tokens of each text, padded on whichever side."""
    if length is None:
        return mask
    length = int(length[0]) if isinstance(length, Tensor) else int(length)
    return mask.masked_fill(mask.cumsum(dim=1) <= length, 0)


class _SentenceEncoding(dict[str, list[int]]):
    """Tokens of a text, and what `preprocess` said about all texts of its call."""

    shared: dict[str, Any]


class Classify(Task):
    """Logits of a model for sequence classification."""

    what = "classify"

    def __init__(self, served: Served) -> None:
        if not _is_classifier(served.inner):
            raise ValueError(
                f"{self.what} needs a model with a head for sequence classification; {type(served.inner).__name__} "
                "has none."
            )
        self.served = served
        self.labels: int = served.inner.config.num_labels

    def encode(self, texts: list[str], **options: Any) -> list[Encoded]:
        return _checked_not_empty(self.served.encode(texts, max_length=self.served.max_length))

    def run(self, texts: Sequence[Encoded]) -> list[Tensor]:
        # Without an id for padding such a model can't tell which token of a padded text is the last one.
        batches = [texts] if self.served.pad_id is not None else [[text] for text in texts]
        logits = [self.served.model(**self.served.padded(batch)).logits for batch in batches]
        return list(torch.cat(logits).float().cpu())

    def assemble(self, answers: list[Tensor], **about: Any) -> Any:
        return Classifications(_stacked(answers, self.labels), **about)


class Rerank(Classify):
    """How well documents fit a query: the logit of a model with one label, or, of two, that of the second over the
    first."""

    what = "rerank"

    def __init__(self, served: Served) -> None:
        super().__init__(served)
        if self.labels > 2:
            raise ValueError(f"rerank needs a model with one label or two; this one has num_labels={self.labels}.")

    def encode(self, texts: list[str], *, query: str = "", **options: Any) -> list[Encoded]:
        return self.served.encode([query] * len(texts), texts, max_length=self.served.max_length) if texts else []

    def assemble(self, answers: list[Tensor], **about: Any) -> Scores:
        scores = [logits[-1] - (logits[0] if self.labels == 2 else 0.0) for logits in answers]
        return Scores(_stacked(scores), **about)


class Prefill(Task):
    """The prefill of a causal model: the cache, and the logits that the next token is drawn from."""

    def __init__(self, served: Served) -> None:
        if not is_causal(served.inner):
            raise ValueError(
                f"prefill needs a causal language model; {type(served.inner).__name__} predicts no next token."
            )
        config = served.inner.config
        known = (DynamicLayer, DynamicSlidingWindowLayer)
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in known}
        kinds |= {"chunked_attention"} & {*(getattr(config.get_text_config(), "layer_types", None) or ())}
        if kinds:
            raise ValueError(
                "prefill serves models that keep keys and values of every token, or of a sliding window's; "
                f"{type(served.inner).__name__} has caches of other kinds: {', '.join(sorted(kinds))}."
            )
        self.served = served

    def encode(self, texts: list[str], **options: Any) -> list[Encoded]:
        encoded = [{"input_ids": text["input_ids"]} for text in self.served.encode(texts)]
        most = self.served.max_length
        for index, text in enumerate(encoded):
            if most is not None and len(text["input_ids"]) > most:
                raise ValueError(
                    f"prompts[{index}] has {len(text['input_ids'])} tokens; the model takes {most}. Shorten it."
                )
        return _checked_not_empty(encoded)

    def run(self, texts: Sequence[Encoded]) -> list[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        batch = self.served.padded(texts, side="left")
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        outputs = self.served.model(**batch, position_ids=positions, use_cache=True, logits_to_keep=1)
        logits = outputs.logits[:, -1].float().cpu()
        rows = []
        for row, text in enumerate(texts):
            own = len(text["input_ids"])
            # Copies: a view would keep the cache of the whole batch alive. A sliding window holds fewer than its own.
            layers = [
                (layer.keys[row : row + 1, :, -own:].clone(), layer.values[row : row + 1, :, -own:].clone())
                for layer in outputs.past_key_values.layers
            ]
            rows.append((logits[row], layers))
        return rows

    def assemble(self, answers: list[Any], **about: Any) -> Prefilled:
        inner = self.served.inner
        cache = DynamicCache(config=inner.config)
        lengths: list[int] = about["lengths"]
        longest = max(lengths, default=0)
        mask = torch.tensor(
            [[0] * (longest - length) + [1] * length for length in lengths], dtype=torch.long, device=inner.device
        ).reshape(len(lengths), longest)
        for index in range(len(answers[0][1]) if answers else 0):
            parts = [[layers[index][part] for _, layers in answers] for part in (0, 1)]
            held = max(states.shape[-2] for states in parts[0])
            keys, values = (
                torch.cat([pad(states, (0, 0, held - states.shape[-2], 0)) for states in part]) for part in parts
            )
            cache.update(keys, values, index)
            layer = cache.layers[index]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = longest  # what it has seen, of which it holds the end
        vocabulary = inner.config.get_text_config().vocab_size
        return Prefilled(_stacked([row for row, _ in answers], vocabulary), cache, mask, **about)


def _warn_about_cut(most: int) -> None:
    warnings.warn(
        f"Texts of more than {most} tokens are cut to that: the model answers about their beginning.", stacklevel=3
    )


def _stacked(rows: list[Tensor], *shape: int) -> Tensor:
    """Rows of this shape as one tensor, of no row too."""
    return torch.stack(rows) if rows else torch.zeros(0, *shape)


def _checked_not_empty(encoded: list[Any]) -> list[Any]:
    for index, text in enumerate(encoded):
        if not text["input_ids"]:
            raise ValueError(f"Text {index} has no tokens: the tokenizer adds none to an empty text. Leave it out.")
    return encoded
