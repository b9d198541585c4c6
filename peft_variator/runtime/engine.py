"""A model in, answers and the ratio of each out: dynamic batches, whose ratio a policy chooses by the load."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Unpack, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..field_types import is_whole, whole_number
from ..pooling import check_pooling
from ..tuners.variator import using_ratio
from ..tuners.variator.forward_context import NO_RATIO_INSIDE
from ..tuners.variator.layer import plugin_layers
from ..tuners.variator.ratios import compression_ratio_of
from .engine_metrics import BatchRecord, Counts, EngineMetrics
from .policies import FixedRatio, Policy
from .queueing import (
    DeadlineQueue,
    EngineClosed,
    Limits,
    QueuedText,
    QueueFull,
    Request,
    checked_limits,
    checked_query,
    checked_slo,
    checked_texts,
    take_batch,
)
from .tasks import (
    Classifications,
    Classify,
    Embed,
    Embeddings,
    EmbedSentences,
    Prefill,
    Prefilled,
    Rerank,
    Scores,
    Served,
    Task,
    has_plugin,
    is_sentence_transformer,
    unwrap,
)


__all__ = ["Engine", "check_max_length"]

logger = logging.getLogger(__name__)


def check_max_length(max_length: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise if texts can't be cut to so many tokens.

    Raises:
        TypeError: it is no integer, nor `None`.
        ValueError: it leaves no room for a text.
    """
    if max_length is None:
        return
    if not is_whole(max_length):
        raise TypeError(f"max_length={max_length!r} has to be an integer or None.")
    if max_length < 1:
        raise ValueError(f"max_length={max_length} has to be at least 1.")
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        marks = tokenizer.num_special_tokens_to_add()
        if max_length <= marks:
            raise ValueError(
                f"max_length={max_length} leaves no room for a text beside the {marks} tokens that the tokenizer "
                f"puts around it, and would cut nothing. It has to be at least {marks + 1}."
            )


class Engine:
    """Answers questions with a model, at the compression ratio that the load allows.

    Calls may come from any threads and event loops. Their texts wait in one queue, a policy chooses how many of them
    run next and at which ratio, and one thread runs them. An answer that misses its deadline is counted, and given
    all the same. What a call gets does not depend on the batches that its texts ran in, except for the ratio, and for
    models whose activations are rounded with one scale a batch (torch's `quantize_dynamic` in int8).

    ```python
    with Engine(model, tokenizer, policy=SlackFit(table), slo_ms=50) as engine:
        vectors = engine.embed(["a text", "another"]).embeddings
    ```

    Leaving the block, or `close()`, answers what waits and refuses what comes; so does the end of the program.

    Args:
        model: a model with a Variator plugin, from PEFT or transformers' `load_adapter`, or a `SentenceTransformer`;
            without a plugin it runs at k = 1 alone. Put into evaluation mode.
        tokenizer: the model's; a SentenceTransformer brings its own.
        policy: what chooses; `None`: always the plugin's own ratio, as it is now.
        slo_ms: milliseconds from a call to its deadline, unless the call names its own; infinity: none.
        max_queue: most texts that may wait. A call that does not fit is refused whole.
        pooling: how hidden states become an embedding: a name in `peft_variator.pooling.POOLINGS`; `None`: as
            the folder of the model says, else `"mean"`.
        normalize: whether embeddings have length 1; `None`: as the folder says, else yes.
        max_length: most tokens of a text that is embedded, classified or ranked, the rest is cut off; `None`: as many
            as the folder and the model allow.
        on_batch: called after each batch, in the engine's thread.
        clock: gives the time in seconds; another than `time.monotonic` is for tests.

    Raises:
        TypeError: something is not of the kind that is needed.
        ValueError: an option is out of range, or the plugin refuses a ratio of the policy.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        policy: Policy | None = None,
        *,
        slo_ms: float = 50.0,
        max_queue: int = 1024,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        on_batch: Callable[[BatchRecord], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; give a PeftModel or a SentenceTransformer.")
        self.slo_ms = checked_slo(slo_ms)
        self.max_queue = whole_number("max_queue", max_queue, 1)
        if on_batch is not None and not callable(on_batch):
            raise TypeError(f"on_batch={on_batch!r} has to be a function of a BatchRecord, or None.")
        if not callable(clock):
            raise TypeError(f"clock={clock!r} has to be a function that gives seconds, as time.monotonic is.")
        if normalize not in (None, True, False):
            raise TypeError(f"normalize={normalize!r} has to be True, False or None.")
        self.model = model
        self._has_plugin = has_plugin(model)
        self.policy = policy or FixedRatio(compression_ratio_of(model) if self._has_plugin else 1)
        self._check_policy()
        self._embedding = (None if pooling is None else check_pooling(pooling), normalize)
        self._served = self._serve(tokenizer, max_length)
        self._tasks: dict[type[Task], Task] = {}
        self._on_batch, self._clock = on_batch, clock
        model.eval()

        self._queue: DeadlineQueue[QueuedText] = DeadlineQueue(lambda text: text.request.task)
        # Guards everything below; notified when there is something to do.
        self._wake = threading.Condition()
        self._closing = False
        self._entering = 0  # calls that were taken and are being tokenized
        self._counts = Counts()
        self._last = 1
        # Of event loops: their own executor may be busy with other things for as long as it likes. One thread is as
        # fast as many, since a tokenizer has a lock.
        self._encoding = ThreadPoolExecutor(1, "peft-variator-tokenizer")
        self._thread = threading.Thread(target=self._work, name="peft-variator-engine", daemon=True)
        self._thread.start()
        # A thread that is inside of torch when the interpreter ends takes the process down with it.
        atexit.register(self.close)

    # What it is made from

    def _check_policy(self) -> None:
        if isinstance(self.policy, type) or not callable(getattr(self.policy, "choose", None)):
            raise TypeError(
                f"policy is {self.policy!r}; give an object with choose(now, queue, last), e.g. FixedRatio(4)."
            )
        for k in getattr(self.policy, "ratios", ()):
            with self._at_ratio(k):
                pass  # entering checks it, now and not in the middle of the first rush

    def _serve(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> Served | None:
        check_max_length(max_length, tokenizer)
        if is_sentence_transformer(self.model):
            if tokenizer is not None or max_length is not None:
                raise ValueError(
                    "A SentenceTransformer brings its own tokenizer and max_seq_length: leave out tokenizer and "
                    "max_length."
                )
            return None
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer is {type(tokenizer).__name__}; give the tokenizer of the model.")
        return Served.of(self.model, tokenizer, max_length)

    def _task(self, kind: type[Task]) -> Task:
        """A task of this model, made when it is first asked for."""
        with self._wake:
            if kind not in self._tasks:
                self._tasks[kind] = self._new_task(kind)
            return self._tasks[kind]

    def _new_task(self, kind: type[Task]) -> Task:
        if self._served is not None:
            return Embed(self._served, *self._embedding) if kind is Embed else cast(Any, kind)(self._served)
        if kind is not Embed:
            raise ValueError(f"A SentenceTransformer only embeds; {kind.__name__.lower()} needs another model.")
        return EmbedSentences(unwrap(self.model), *self._embedding)

    def _at_ratio(self, k: int) -> Any:
        return using_ratio(self.model, k) if self._has_plugin or k != 1 else nullcontext()

    # Questions

    def embed(self, texts: Sequence[str], **limits: Unpack[Limits]) -> Embeddings:
        """One vector for each text.

        Args:
            texts: a list of texts; those that are too long for the model are cut.
            limits: `slo_ms`, `min_quality` and `max_ratio`, as [`Limits`] says.

        Raises:
            TypeError: `texts` is no list of texts, or an option is not of its type.
            ValueError: an option is out of range, or the model embeds no text.
            QueueFull: the texts do not fit into the queue; none was taken.
            EngineClosed: the engine is closed.
        """
        return cast(Embeddings, self._ask(Embed, texts, "texts", **limits))

    async def aembed(self, texts: Sequence[str], **limits: Unpack[Limits]) -> Embeddings:
        """As `embed`, for an event loop. A call that is cancelled leaves the queue."""
        return cast(Embeddings, await self._aask(Embed, texts, "texts", **limits))

    def classify(self, texts: Sequence[str], **limits: Unpack[Limits]) -> Classifications:
        """Logits of each text, from a model for sequence classification. Arguments and errors are those of `embed`."""
        return cast(Classifications, self._ask(Classify, texts, "texts", **limits))

    async def aclassify(self, texts: Sequence[str], **limits: Unpack[Limits]) -> Classifications:
        """As `classify`, for an event loop."""
        return cast(Classifications, await self._aask(Classify, texts, "texts", **limits))

    def rerank(self, query: str, documents: Sequence[str], **limits: Unpack[Limits]) -> Scores:
        """How well each document fits the query.

        It is the logit of a model with one label; of two labels, the second's logit less the first's.

        Args:
            query: a text.
            documents: a list of texts, scored in their order.
            limits: as in `embed`, and so are the errors.
        """
        options = {"query": checked_query(query)}
        return cast(Scores, self._ask(Rerank, documents, "documents", options, **limits))

    async def arerank(self, query: str, documents: Sequence[str], **limits: Unpack[Limits]) -> Scores:
        """As `rerank`, for an event loop."""
        options = {"query": checked_query(query)}
        return cast(Scores, await self._aask(Rerank, documents, "documents", options, **limits))

    def prefill(self, prompts: Sequence[str], **limits: Unpack[Limits]) -> Prefilled:
        """The cache of each prompt, and the logits of its last position, from a causal language model.

        A prompt's row of the cache is made at one ratio, which is in `.ratios` and stays that of the row: whoever
        prefills more into it uses the same one. Tokens that are decoded one at a time run on the base at any ratio.
        Prompts are never cut. Other arguments and errors are those of `embed`.
        """
        return cast(Prefilled, self._ask(Prefill, prompts, "prompts", **limits))

    async def aprefill(self, prompts: Sequence[str], **limits: Unpack[Limits]) -> Prefilled:
        """As `prefill`, for an event loop."""
        return cast(Prefilled, await self._aask(Prefill, prompts, "prompts", **limits))

    def submit(self, texts: Sequence[str], **limits: Unpack[Limits]) -> Future[Embeddings]:
        """As `embed`, without waiting: a future of its result. Cancelling it takes the texts out of the queue."""
        return cast("Future[Embeddings]", self._submit(Embed, texts, "texts", **limits))

    def _ask(self, *question: Any, **limits: Unpack[Limits]) -> Any:
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "The engine was asked in its own thread, by on_batch or by what is called with an answer: it would "
                "wait for itself. Use submit there."
            )
        future = self._submit(*question, **limits)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # whoever asked stopped waiting, by Ctrl-C say
            raise

    async def _aask(self, *question: Any, **limits: Unpack[Limits]) -> Any:
        # Tokenizing takes its time, and may wait for another thread's: not in the event loop.
        arrival = self._enter()
        try:
            submitting = asyncio.get_running_loop().run_in_executor(
                self._encoding, partial(self._enqueue, arrival, *question, **limits)
            )
        except BaseException:  # the interpreter ends
            self._leave()
            raise
        try:
            future = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_result)
            raise
        return await asyncio.wrap_future(future)

    def _submit(self, *question: Any, **limits: Unpack[Limits]) -> Future[Any]:
        return self._enqueue(self._enter(), *question, **limits)

    def _enter(self) -> float:
        """Take a call, which closing waits for from here on, and give its arrival; `_enqueue` has to follow."""
        self._check_open()  # a process that was forked inherits the lock as it was, maybe held for good
        arrival = self._clock()
        with self._wake:
            self._check_open()
            self._entering += 1
        return arrival

    def _leave(self) -> None:
        with self._wake:
            self._entering -= 1
            self._wake.notify_all()

    def _enqueue(
        self,
        arrival: float,
        kind: type[Task],
        texts: Sequence[str],
        name: str,
        options: dict[str, Any] | None = None,
        **limits: Any,
    ) -> Future[Any]:
        """Check a call that was taken and put its texts into the queue, all or none."""
        try:  # whatever is wrong with the call: closing waits until it has left
            texts = checked_texts(texts, name)
            slo_ms, min_quality, max_ratio = checked_limits(limits)
            deadline = arrival + (self.slo_ms if slo_ms is None else slo_ms) / 1000
            task = self._task(kind)
            with self._wake:  # before texts are tokenised that have no room in any case
                self._check_room(len(texts))
            encoded = task.encode(texts, **(options or {})) if texts else []
            request = Request(task, len(texts))
            if not texts:
                request.finish()
                return request.future
            with self._wake:
                self._check_room(len(texts))
                self._counts.add(requests=1)
                for index, each in enumerate(encoded):
                    length = len(each["input_ids"])
                    self._queue.add(
                        QueuedText(arrival, length, deadline, min_quality, max_ratio, each, request, index)
                    )
        finally:
            self._leave()
        request.future.add_done_callback(partial(self._forget, request))
        return request.future

    def _check_room(self, count: int) -> None:
        if len(self._queue) + count > self.max_queue:
            self._counts.add(refused=1)
            raise QueueFull(
                f"{count} texts do not fit into the queue: {len(self._queue)} wait, and max_queue is "
                f"{self.max_queue}. Ask again later, or with fewer."
            )

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("The engine is closed. Make another one to ask.")
        if not self._thread.is_alive():
            raise EngineClosed("The engine's thread is not in this process, which was forked. Make one here to ask.")

    def _forget(self, request: Request, future: Future[Any]) -> None:
        """Take the texts of a call that was given up, or that failed, out of the queue."""
        if future.cancelled() or future.exception() is not None:
            with self._wake:
                removed = len(self._queue.remove(lambda text: text.request is request))
                self._counts.add(**{"cancelled" if future.cancelled() else "failed": removed})

    # Answers

    def _work(self) -> None:
        while True:
            with self._wake:
                while not len(self._queue) and not (self._closing and not self._entering):
                    self._wake.wait()
                if not len(self._queue):
                    self._encoding.shutdown(wait=False)
                    return
                texts, ratio, error = self._next_batch()
            if error is None:
                self._run(texts, ratio)
            else:
                self._fail(texts, error)

    def _next_batch(self) -> tuple[list[QueuedText], int, BaseException | None]:
        """What the policy chooses; if it fails, or breaks its contract, all that it was shown, with the error."""
        try:
            ratio, texts = take_batch(self.policy, self._queue, self._clock(), self._last)
            return texts, ratio, None
        except BaseException as error:
            return self._queue.remove(set(self._queue.view()).__contains__), 1, error

    def _merges(self) -> bool:
        """Whether the plugin is on, which its owner may switch off beside the engine."""
        return any(layer.active_plugin is not None for layer in plugin_layers(self.model))

    def _run(self, texts: list[QueuedText], ratio: int) -> None:
        started = self._clock()
        failure: BaseException | None = None
        answers: list[Any] = []
        try:
            with torch.no_grad(), self._at_ratio(ratio):
                answers = texts[0].request.task.run([text.encoded for text in texts])
            if not self._merges():
                ratio = 1
        except BaseException as error:  # whatever it is, the next batch may be all right
            failure = _in_words(error)
        ended = self._clock()
        late = [ended > text.deadline for text in texts]
        if failure is None:
            self._deliver(texts, answers, ratio, late, ended)
        else:
            self._fail(texts, failure)
        with self._wake:
            self._counts.add(batches=1, switches=int(ratio != self._last), busy_seconds=ended - started)
            self._last = ratio
        if self._on_batch is not None:
            waited = tuple(started - text.arrival for text in texts)
            longest = max(text.length for text in texts)
            failed = failure is not None
            number = 0 if failed else sum(late)
            record = BatchRecord(ratio, len(texts), longest, waited, ended - started, number, failed, started)
            try:
                self._on_batch(record)
            except BaseException:  # even one that ends a thread: this one is everybody's
                logger.exception("on_batch failed; the answers of the batch are not affected.")

    def _deliver(
        self, texts: list[QueuedText], answers: list[Any], ratio: int, late: list[bool], ended: float
    ) -> None:
        # Counted first: whoever has an answer finds it in the metrics.
        with self._wake:
            self._counts.add_answers(ratio, [ended - text.arrival for text in texts], sum(late))
        for text, answer, is_late in zip(texts, answers, late, strict=True):
            text.request.put(text.index, answer, ratio, text.length, is_late)
        for request in dict.fromkeys(text.request for text in texts):
            if not request.missing:
                request.finish()

    def _fail(self, texts: list[QueuedText], error: BaseException) -> None:
        with self._wake:
            self._counts.add(failed=len(texts))
        for request in dict.fromkeys(text.request for text in texts):
            request.fail(error)

    @property
    def waiting(self) -> int:
        """Texts that wait now."""
        with self._wake:
            return len(self._queue)

    @property
    def metrics(self) -> EngineMetrics:
        """What the engine has done so far; it stays readable when the engine is closed."""
        with self._wake:
            return self._counts.metrics(len(self._queue))

    # Its life

    @property
    def closed(self) -> bool:
        """Whether it takes no more questions."""
        return self._closing

    def close(self) -> None:
        """Answer what waits, and refuse what comes. Closing twice is closing once."""
        atexit.unregister(self.close)
        if not self._thread.is_alive():  # closed before, or in a process that was forked
            self._closing = True
            return
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _cancel_result(submitting: asyncio.Future[Future[Any]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


def _in_words(error: BaseException) -> BaseException:
    """What stopped a batch; of a model that no ratio can be chosen for, what to do."""
    if NO_RATIO_INSIDE not in str(error):
        return error
    told = RuntimeError(
        "An engine chooses a ratio for each batch, which a model that was compiled with fullgraph=True can't take up. "
        "Compile it without fullgraph, or give the engine the model as it is."
    )
    told.__cause__ = error
    return told
