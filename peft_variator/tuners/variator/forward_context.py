"""What one forward call tells: its arguments, those of the models around it, and which plugin it uses.

The calls that are under way are kept for each thread, so that any number of threads can share a model: a forward call
runs in one thread from its start to its end. Nested calls stack up. Which plugin and ratio a *task* has chosen is kept
in a `ContextVar`, which asyncio tasks and `asyncio.to_thread` inherit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...compat import backward_id
from .attention_mask import CUMULATIVE_LENGTHS, SEQUENCE_NUMBERS, TokenOrder, last_tokens


__all__ = [
    "IGNORED_LABEL",
    "NO_RATIO_INSIDE",
    "RATIO_NOTE",
    "CallFacts",
    "ForwardCall",
    "PluginRatios",
    "Selection",
    "StackKind",
    "call_around",
    "calls_of_any_size",
    "merges_any_size",
    "next_token_labels",
    "open_calls",
    "parameter_names",
    "recompute_inside",
    "recomputed_calls",
    "recorded_arguments",
    "run_inside",
    "runs_single_blocks",
    "selected",
    "selection_of",
    "single_blocks",
    "used_predictions",
]

StackKind = Literal["encoder", "causal", "vision", "audio"]
Result = TypeVar("Result")

IGNORED_LABEL = -100
NO_RATIO_INSIDE = (
    "using_ratio can't select a ratio inside of code that torch.compile made or makes with fullgraph=True. Compile "
    "without fullgraph, call the model that is not compiled, or choose the ratio with set_compression_ratio "
    "outside of any using_ratio block."
)
RATIO_NOTE = "peft_variator.compression_ratio"  # on the nodes of an exported program
# What a head knows and its stack does not; the ids too, which a vision-language model turns into embeddings.
OF_HEADS = ("input_ids", "labels", "logits_to_keep", "shift_labels")
OF_STACKS = (
    "attention_mask",
    *CUMULATIVE_LENGTHS,
    "inputs_embeds",
    "output_router_logits",
    "past_key_values",
    "patch_attention_mask",
    "pixel_attention_mask",
    "pixel_values",
    "position_ids",
    SEQUENCE_NUMBERS,
    "write_index",  # of continuous batching: where in its paged cache the tokens go
)


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that the forward of a module's class takes."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def recorded_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that say something about its tokens, by name.

    Args:
        names: see [`parameter_names`].
        args: arguments by position.
        kwargs: arguments by name.
    """
    arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: arguments[name] for name in OF_HEADS + OF_STACKS if arguments.get(name) is not None}


# Which plugin, and which ratio


class PluginRatios:
    """The compression ratios of all plugins of a base model, one object for all layers.

    A call reads `chosen` and `min_tokens` once. They are replaced and never changed, so that no answer mixes two
    ratios.
    """

    def __init__(self) -> None:
        self.chosen: Mapping[str, int] = {}
        """The ratio that was set at run time, by plugin; a plugin that is not in it has the one it was made with."""
        self.min_tokens: Mapping[str, int] = {}
        """How many tokens a call needs to be merged, by plugin; one that is not in it merges calls of any size."""
        self.warned: dict[str, set[int]] = {}
        """Ratios that a plugin was not trained for and that were chosen all the same, by plugin."""

    def choose(self, adapter_name: str, ratio: int | None) -> None:
        """Set the ratio of a plugin; `None`: the one of its configuration."""
        with _lock:
            self.chosen = _with_entry(self.chosen, adapter_name, ratio)

    def require(self, adapter_name: str, min_tokens: int) -> None:
        """Set how many tokens a call needs for a plugin to merge them; 0: any call will do."""
        with _lock:
            self.min_tokens = _with_entry(self.min_tokens, adapter_name, min_tokens or None)


def _with_entry(entries: Mapping[str, int], name: str, value: int | None) -> Mapping[str, int]:
    """A copy with another value under a name, or, for `None`, none there."""
    others = {each: kept for each, kept in entries.items() if each != name}
    return others if value is None else {**others, name: value}


class Selection(NamedTuple):
    """What a thread or task has chosen for itself."""

    adapter: str
    ratio: int


@dataclass(eq=False)
class _Block:
    """One block of [`selected`], told from others by its identity.

    Args:
        ratios: of the model that is chosen for.
        selection: what is chosen.
        is_open: `False` once it was left in another context than it was entered in, which may still hold it.
    """

    ratios: PluginRatios
    selection: Selection
    is_open: bool = True


_lock = threading.Lock()
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("variator_blocks", default=())
# Nobody reads it: the tokens of its values tell the context that they were made in.
_entered: ContextVar[None] = ContextVar("variator_entered", default=None)


class _OpenSelections:
    """How many blocks of [`selected`] are open in the process; compiled code can't ask the `ContextVar`."""

    count = 0


_open_selections = _OpenSelections()


@contextmanager
def selected(ratios: PluginRatios, selection: Selection) -> Iterator[None]:
    """Use a plugin at a ratio for all calls that this thread or task makes inside the block.

    Blocks may be left in another order than they were entered, as those of generators that run by turns are, and in
    another thread or task: what the block chose then counts nowhere any more.
    """
    block, token = _Block(ratios, selection), _entered.set(None)
    _blocks.set((*_blocks.get(), block))
    with _lock:
        _open_selections.count += 1
    try:
        yield
    finally:
        with _lock:
            _open_selections.count -= 1
        try:
            _entered.reset(token)
        except ValueError:  # another context, from which that of the token is out of reach
            block.is_open = False
        # Not what there was before the block: another one may have been entered since, and another left.
        _blocks.set(tuple(each for each in _blocks.get() if each is not block and each.is_open))


def selection_of(ratios: PluginRatios) -> Selection | None:
    """What this thread or task has chosen for the model that `ratios` belongs to.

    Raises:
        RuntimeError: code that is being compiled asks while anyone in the process has chosen: it can't tell who.
    """
    if torch.compiler.is_compiling():
        if _open_selections.count:
            raise RuntimeError(NO_RATIO_INSIDE)
        return None
    for block in reversed(_blocks.get()):
        if block.ratios is ratios and block.is_open:
            return block.selection
    return None


# The calls that are under way


@dataclass(eq=False)
class ForwardCall:
    """A forward call that is under way.

    Args:
        module: the module that was called.
        arguments: see [`recorded_arguments`].
        ratios: of the model that the module belongs to.
        chosen: what `ratios.chosen` was when the outermost call of that model started.
        min_tokens: what `ratios.min_tokens` was then.
        groups: how the plugins of a stack merge; `None` for a module around a stack.
    """

    module: nn.Module
    arguments: dict[str, Any]
    ratios: PluginRatios
    chosen: Mapping[str, int]
    min_tokens: Mapping[str, int]
    groups: Any = None


class _ThreadCalls(threading.local):
    def __init__(self) -> None:
        # Every thread starts with attributes of its own: code compiled while it had only those of the class would be
        # compiled again after the first call had set them.
        self.calls: tuple[ForwardCall, ...] = ()
        self.recomputed: tuple[int, tuple[ForwardCall, ...]] = (-1, ())
        self.runs_single_blocks = False
        self.merges_any_size = False


# An attribute of a thread-local object, since torch.compile follows it, as it does not follow a ContextVar.
_thread = _ThreadCalls()


def open_calls() -> tuple[ForwardCall, ...]:
    """The calls that are under way in this thread, outermost first."""
    return _thread.calls


def run_inside(calls: tuple[ForwardCall, ...], function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function with `calls` as the calls that are under way in this thread."""
    before = _thread.calls
    _thread.calls = calls
    try:
        return function(*args, **kwargs)
    finally:
        _thread.calls = before


def recomputed_calls() -> tuple[ForwardCall, ...]:
    """The calls that were under way when what this thread's backward is about to compute again was computed first."""
    backward, calls = _thread.recomputed
    return calls if backward == backward_id() != -1 else ()


def recompute_inside(calls: tuple[ForwardCall, ...], gradient: Tensor) -> None:
    """Have `recomputed_calls` give these calls in this thread, as long as its backward runs: a hook on a gradient."""
    _thread.recomputed = (backward_id(), calls)


@contextmanager
def single_blocks() -> Iterator[None]:
    """Let this thread call blocks and networks of a model one by one: without a call they are the base model's.

    For calibrating the base model under a plugin. Anywhere else a plugin that is reached without a call is an error.
    """
    before = _thread.runs_single_blocks
    _thread.runs_single_blocks = True
    try:
        yield
    finally:
        _thread.runs_single_blocks = before


def runs_single_blocks() -> bool:
    """Whether this thread is inside of [`single_blocks`]."""
    return _thread.runs_single_blocks


@contextmanager
def calls_of_any_size() -> Iterator[None]:
    """Have this thread's calls merged whatever their size: of a plugin that is trained, or measured as one is."""
    before = _thread.merges_any_size
    _thread.merges_any_size = True
    try:
        yield
    finally:
        _thread.merges_any_size = before


def merges_any_size() -> bool:
    """Whether this thread is inside of [`calls_of_any_size`]."""
    return _thread.merges_any_size


def call_around(ratios: PluginRatios) -> PluginRatios | ForwardCall:
    """Whose `chosen` and `min_tokens` count for a call that starts now: the outermost call's of the same model."""
    for call in _thread.calls:
        if call.ratios is ratios:
            return call
    return ratios


# What the arguments tell about the tokens


@dataclass
class CallFacts:
    """What is known about a call's tokens before any layer runs.

    Args:
        kind: whether the stack is an encoder, causal, or an encoder of images or of sound.
        arguments: the arguments of the call, those of the surrounding models included.
        image_ids: token ids that stand for an image's tokens.
        image_tokens: which tokens stand for an image's, where embeddings take the place of ids; `(batch, length)`.
        shifted_labels: whether `labels` are next-token labels (a language-model head) rather than one a token.
        patch_size: edge of a patch in pixels, of vision encoders.
        pooled_pad_id: the id of padding, where a sequence classifier uses the last token of another id.
        past_length: number of tokens that the key-value cache of a causal stack held before the call, padding
            included. It has to be read before the first layer adds to the cache.
        reads_last_place: whether the model uses the hidden state at the last place of a row, be it padding or not.
    """

    kind: StackKind
    arguments: Mapping[str, Any] = field(default_factory=dict)
    image_ids: tuple[int, ...] = ()
    image_tokens: Tensor | None = None
    shifted_labels: bool = True
    patch_size: tuple[int, int] | None = None
    pooled_pad_id: int | None = None
    past_length: int | Tensor = 0
    reads_last_place: bool = False

    @property
    def tokens(self) -> Tensor | None:
        """The argument that tells how many tokens the text in this call has, and the device of the call's masks."""
        if self.kind in ("vision", "audio"):
            return None
        for name, dims in (("input_ids", 2), ("inputs_embeds", 3), ("attention_mask", 2)):
            tokens = self.arguments.get(name)
            if isinstance(tokens, Tensor) and tokens.dim() == dims:
                return tokens
        return None

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(batch, length)` of the text in this call; `None` where only the hidden states tell."""
        tokens = self.tokens
        return None if tokens is None else (tokens.shape[0], tokens.shape[1])

    def token_ids(self, shape: tuple[int, int]) -> Tensor | None:
        """The ids of the tokens, `(batch, length)`; `None` where embeddings take their place."""
        ids = self.arguments.get("input_ids")
        return ids if isinstance(ids, Tensor) and tuple(ids.shape) == shape else None


# Which predictions of a causal model are used


def next_token_labels(arguments: Mapping[str, Any], shape: tuple[int, int], *, shifted: bool = True) -> Tensor | None:
    """What each position is trained to predict, -100 for nothing, `(batch, length)`; `None` without labels.

    Args:
        arguments: of a model's call; `shift_labels` stand where they belong, `labels` one position later.
        shape: `(batch, length)`.
        shifted: whether `labels` are a language model's, which a position before them predicts.
    """
    ready, labels = arguments.get("shift_labels"), arguments.get("labels")
    if isinstance(ready, Tensor) and tuple(ready.shape) == shape:
        return ready
    # Targets of a multi-label classifier have this shape, too, where a sequence has a token for each label.
    if not isinstance(labels, Tensor) or tuple(labels.shape) != shape or labels.is_floating_point():
        return None
    return pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if shifted else labels


def used_predictions(facts: CallFacts, order: TokenOrder, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Positions of a causal model whose own prediction is used, and so must not see later tokens; `(batch, length)`.

    They come from the labels in training, else from `logits_to_keep`, which generation sets; a plain call uses the
    prediction of the last real token of each text only, and a sequence classifier also that of the last token which is
    no padding by its id.
    """
    labels = next_token_labels(facts.arguments, shape, shifted=facts.shifted_labels)
    if labels is not None:
        return labels != IGNORED_LABEL
    used = order.last(1)
    kept_logits = facts.arguments.get("logits_to_keep")
    if isinstance(kept_logits, Tensor):
        kept = torch.zeros(shape, dtype=torch.bool, device=device)
        kept[:, kept_logits] = True
        used = used | kept
    elif kept_logits:
        used = used | (torch.arange(shape[1], device=device) >= shape[1] - kept_logits)
    ids = facts.token_ids(shape)
    if ids is not None and facts.pooled_pad_id is not None:
        used = used | last_tokens(ids != facts.pooled_pad_id)
    return used
