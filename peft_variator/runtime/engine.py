"""A model in, answers and the ratio of each out: dynamic batches, whose ratio a policy chooses by the load."""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..tuners.variator import using_ratio
from ..tuners.variator.ratios import compression_ratio_of
from .latency import has_plugin, unwrap
from .policies import FixedRatio, Policy
from .pooling import check_pooling
from .queueing import DeadlineQueue
from .tasks import (
    Classifications,
    Classify,
    Embed,
    Embeddings,
    EmbedSentences,
    Encoded,
    Prefill,
    Prefilled,
    Rerank,
    Scores,
    Served,
    Task,
)


__all__ = ["BatchRecord", "Engine", "EngineClosed", "EngineMetrics", "Limits", "QueueFull"]

logger = logging.getLogger(__name__)

MOST_TIMES = 10_000  # answers whose times are remembered for the percentiles


class EngineClosed(RuntimeError):
    """The engine was asked after it had been closed."""


class QueueFull(RuntimeError):
    """A call has more texts than the queue has room for; none of them was taken."""


class Limits(TypedDict, total=False):
    """What one call asks of its answer; each may be left out."""

    slo_ms: float | None
    """Milliseconds until the answer is due; `None`: the engine's."""
    min_quality: float | None
    """Least quality of the ratio that is used, on the scale of the policy's latency table; where nobody measured it,
    and with policies that know none, the base answers, k = 1."""
    max_ratio: int | None
    """Largest ratio that may be used."""


@dataclass(frozen=True)
class BatchRecord:
    """One batch that ran.

    Args:
        ratio: compression ratio k.
        size: texts in it.
        length: tokens of the longest.
        waited: seconds that each text waited before the batch started.
        seconds: what the batch took.
        late: texts whose answers came after their deadlines.
        failed: whether it raised an error.
    """

    ratio: int
    size: int
    length: int
    waited: tuple[float, ...]
    seconds: float
    late: int
    failed: bool


@dataclass(frozen=True)
class EngineMetrics:
    """What an engine has done so far.

    Args:
        requests: calls that were taken.
        refused: calls that did not fit into the queue.
        waiting: texts that wait now.
        answered: texts that were answered.
        late: those of them whose answers came after their deadlines.
        failed: texts whose batch, or whose request in another batch, failed.
        cancelled: texts that nobody waited for any more.
        batches: batches that ran.
        switches: batches at another ratio than the one before.
        texts_by_ratio: k -> texts answered at it.
        busy_seconds: seconds that batches took, together.
        latency_ms: 50th, 95th and 99th percentile of the last answers, from being asked to being answered, by the
            names `p50`, `p95`, `p99`; empty before the second answer.
    """

    requests: int = 0
    refused: int = 0
    waiting: int = 0
    answered: int = 0
    late: int = 0
    failed: int = 0
    cancelled: int = 0
    batches: int = 0
    switches: int = 0
    texts_by_ratio: dict[int, int] = field(default_factory=dict)
    busy_seconds: float = 0.0
    latency_ms: dict[str, float] = field(default_factory=dict)

    @property
    def attainment(self) -> float:
        """Share of the answers that came in time; 1 before the first."""
        return 1 - self.late / self.answered if self.answered else 1.0


@dataclass(slots=True, eq=False)
class _Text:
    """One text that waits: what a policy reads of it, and whose it is."""

    arrival: float
    length: int
    deadline: float
    min_quality: float | None
    max_ratio: int | None
    encoded: Encoded
    request: _Request
    index: int


class _Request:
    """One call: its texts may run in several batches."""

    def __init__(self, task: Task, count: int) -> None:
        self.task = task
        self.future: Future[Any] = Future()
        self.answers: list[Any] = [None] * count
        self.ratios, self.lengths, self.late = [1] * count, [0] * count, [False] * count
        self.missing = count

    def put(self, index: int, answer: Any, ratio: int, length: int, late: bool) -> None:
        """Take in one answer."""
        self.answers[index], self.ratios[index], self.lengths[index], self.late[index] = answer, ratio, length, late
        self.missing -= 1

    def finish(self) -> None:
        """Hand over what was asked for."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            about = {"ratios": self.ratios, "lengths": self.lengths, "late": self.late}
            self.future.set_result(self.task.assemble(self.answers, **about))
        except Exception as error:
            self.future.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """Hand over an error instead."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Engine:
    """Answers questions with a model, at the compression ratio that the load allows.

    Calls may come from any threads and event loops. Their texts wait in one queue, a policy chooses how many of them
    run next and at which ratio, and one thread runs them. An answer that misses its deadline is counted, and given
    all the same. What a call gets does not depend on the batches that its texts ran in, except for the ratio.

    ```python
    with Engine(model, tokenizer, policy=SlackFit(table), slo_ms=50) as engine:
        vectors = engine.embed(["a text", "another"]).embeddings
    ```

    Leaving the block, or `close()`, answers what waits and refuses what comes.

    Args:
        model: a model with a Variator plugin, from PEFT or transformers' `load_adapter`, or a `SentenceTransformer`;
            without a plugin it runs at k = 1 alone. Put into evaluation mode.
        tokenizer: the model's; a SentenceTransformer brings its own.
        policy: what chooses; `None`: always the plugin's own ratio.
        slo_ms: milliseconds from a call to its deadline, unless the call names its own; infinity: none.
        max_queue: most texts that may wait. A call that does not fit is refused whole.
        pooling: how hidden states become an embedding: a name in `peft_variator.runtime.pooling.POOLINGS`; `None`: as
            the folder of the model says, else `"mean"`.
        normalize: whether embeddings have length 1; `None`: as the folder says, else yes.
        max_length: most tokens of a text that is embedded, classified or ranked, the rest is cut off; `None`: as many
            as the folder and the model allow.
        on_batch: called after each batch, in the engine's thread.

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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; give a PeftModel or a SentenceTransformer.")
        self.slo_ms = _checked_slo(slo_ms)
        if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 1:
            raise ValueError(f"max_queue={max_queue!r} has to be an integer of at least 1.")
        self.max_queue = max_queue
        self.model = model
        self._has_plugin = has_plugin(model)
        self.policy = policy or FixedRatio(compression_ratio_of(model) if self._has_plugin else 1)
        self._check_policy()
        self._embedding = (None if pooling is None else check_pooling(pooling), normalize)
        self._served = self._serve(tokenizer, max_length)
        self._tasks: dict[type[Task], Task] = {}
        self._on_batch = on_batch
        model.eval()

        self._queue: DeadlineQueue[_Text] = DeadlineQueue(lambda text: text.request.task)
        # Guards everything below; notified when there is something to do.
        self._wake = threading.Condition()
        self._closing = False
        self._counts = EngineMetrics()
        self._by_ratio: Counter[int] = Counter()
        self._times: deque[float] = deque(maxlen=MOST_TIMES)
        self._last = 1
        self._thread = threading.Thread(target=self._work, name="peft-variator-engine", daemon=True)
        self._thread.start()

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
        if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
            raise TypeError(f"max_length={max_length!r} has to be an integer or None.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} has to be at least 1.")
        if isinstance(unwrap(self.model), nn.Sequential):  # what a SentenceTransformer is
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
        """A task of this model, made when it is first asked for.

        Raises:
            ValueError: the model cannot do it.
        """
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

    def embed(
        self,
        texts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Embeddings:
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

    async def aembed(
        self,
        texts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Embeddings:
        """As `embed`, for an event loop. A call that is cancelled leaves the queue."""
        return cast(Embeddings, await self._aask(Embed, texts, "texts", **limits))

    def classify(
        self,
        texts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Classifications:
        """Logits of each text, from a model for sequence classification. Arguments and errors are those of `embed`."""
        return cast(Classifications, self._ask(Classify, texts, "texts", **limits))

    async def aclassify(
        self,
        texts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Classifications:
        """As `classify`, for an event loop."""
        return cast(Classifications, await self._aask(Classify, texts, "texts", **limits))

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Scores:
        """How well each document fits the query.

        It is the logit of a model with one label; of two labels, the second's logit less the first's.

        Args:
            query: a text.
            documents: a list of texts, scored in their order.
            limits: as in `embed`, and so are the errors.
        """
        options = {"query": _checked_query(query)}
        return cast(Scores, self._ask(Rerank, documents, "documents", options, **limits))

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Scores:
        """As `rerank`, for an event loop."""
        options = {"query": _checked_query(query)}
        return cast(Scores, await self._aask(Rerank, documents, "documents", options, **limits))

    def prefill(
        self,
        prompts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Prefilled:
        """The cache of each prompt, and the logits of its last position, from a causal language model.

        A prompt's row of the cache is made at one ratio, which is in `.ratios` and stays that of the row: whoever
        prefills more into it uses the same one. Tokens that are decoded one at a time run on the base at any ratio.
        Prompts are never cut. Other arguments and errors are those of `embed`.
        """
        return cast(Prefilled, self._ask(Prefill, prompts, "prompts", **limits))

    async def aprefill(
        self,
        prompts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Prefilled:
        """As `prefill`, for an event loop."""
        return cast(Prefilled, await self._aask(Prefill, prompts, "prompts", **limits))

    def submit(
        self,
        texts: Sequence[str],
        **limits: Unpack[Limits],
    ) -> Future[Embeddings]:
        """As `embed`, without waiting: a future of its result. Cancelling it takes the texts out of the queue."""
        return cast("Future[Embeddings]", self._submit(Embed, texts, "texts", **limits))

    def _ask(self, *question: Any, **limits: Unpack[Limits]) -> Any:
        future = self._submit(*question, **limits)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # whoever asked stopped waiting, by Ctrl-C say
            raise

    async def _aask(self, *question: Any, **limits: Unpack[Limits]) -> Any:
        # Tokenizing takes its time, and may wait for another thread's: not in the event loop.
        submitting = asyncio.get_running_loop().run_in_executor(None, partial(self._submit, *question, **limits))
        try:
            future = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_result)
            raise
        return await asyncio.wrap_future(future)

    def _submit(
        self,
        kind: type[Task],
        texts: Sequence[str],
        name: str,
        options: dict[str, Any] | None = None,
        *,
        slo_ms: float | None = None,
        min_quality: float | None = None,
        max_ratio: int | None = None,
    ) -> Future[Any]:
        """Check a call and put its texts into the queue, all or none."""
        arrival = time.monotonic()
        self._check_open()
        texts = _checked_texts(texts, name)
        deadline = arrival + (self.slo_ms if slo_ms is None else _checked_slo(slo_ms)) / 1000
        _check_limits(min_quality, max_ratio)
        task = self._task(kind)
        encoded = task.encode(texts, **(options or {})) if texts else []
        request = _Request(task, len(texts))
        if not texts:
            self._check_open()
            request.finish()
            return request.future
        with self._wake:
            self._check_open()
            if len(self._queue) + len(texts) > self.max_queue:
                self._count(refused=1)
                raise QueueFull(
                    f"{len(texts)} texts do not fit into the queue: {len(self._queue)} wait, and max_queue is "
                    f"{self.max_queue}. Ask again later, or with fewer."
                )
            self._count(requests=1)
            for index, each in enumerate(encoded):
                length = len(each["input_ids"])
                self._queue.add(_Text(arrival, length, deadline, min_quality, max_ratio, each, request, index))
            self._wake.notify()
        request.future.add_done_callback(partial(self._forget, request))
        return request.future

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("The engine is closed. Make another one to ask.")

    def _forget(self, request: _Request, future: Future[Any]) -> None:
        """Take the texts of a call that was given up, or that failed, out of the queue."""
        if future.cancelled() or future.exception() is not None:
            with self._wake:
                removed = len(self._queue.remove(lambda text: text.request is request))
                self._count(**{"cancelled" if future.cancelled() else "failed": removed})

    # Answers

    def _work(self) -> None:
        while True:
            with self._wake:
                while not len(self._queue) and not self._closing:
                    self._wake.wait()
                if not len(self._queue):
                    return
                texts, ratio, error = self._next_batch()
            if error is None:
                self._run(texts, ratio)
            else:
                self._fail(texts, error)

    def _next_batch(self) -> tuple[list[_Text], int, BaseException | None]:
        """What the policy chooses; if it fails, or breaks its contract, all that it was shown, with the error."""
        view = self._queue.view()
        try:
            ratio, count = self.policy.choose(time.monotonic(), view, self._last)
            first = view[0]
            if count < 1 or (first.max_ratio is not None and ratio > first.max_ratio):
                raise ValueError(
                    f"The policy {type(self.policy).__name__} chose k = {ratio} for {count} texts; it has to choose "
                    f"at least one text, and a ratio that it allows (max_ratio={first.max_ratio})."
                )
            return self._queue.take(count), ratio, None
        except BaseException as error:
            return self._queue.remove(set(view).__contains__), 1, error

    def _run(self, texts: list[_Text], ratio: int) -> None:
        started = time.monotonic()
        failure: BaseException | None = None
        answers: list[Any] = []
        try:
            with torch.no_grad(), self._at_ratio(ratio):
                answers = texts[0].request.task.run([text.encoded for text in texts])
        except BaseException as error:  # whatever it is, the next batch may be all right
            failure = error
        ended = time.monotonic()
        late = [ended > text.deadline for text in texts]
        if failure is None:
            self._deliver(texts, answers, ratio, late, ended)
        else:
            self._fail(texts, failure)
        with self._wake:
            self._count(batches=1, switches=int(ratio != self._last), busy_seconds=ended - started)
            self._last = ratio
        if self._on_batch is not None:
            waited = tuple(started - text.arrival for text in texts)
            longest = max(text.length for text in texts)
            number = 0 if failure else sum(late)
            record = BatchRecord(ratio, len(texts), longest, waited, ended - started, number, failure is not None)
            try:
                self._on_batch(record)
            except Exception:
                logger.exception("on_batch failed; the answers of the batch are not affected.")

    def _deliver(self, texts: list[_Text], answers: list[Any], ratio: int, late: list[bool], ended: float) -> None:
        # Counted first: whoever has an answer finds it in the metrics.
        with self._wake:
            self._count(answered=len(texts), late=sum(late))
            self._by_ratio[ratio] += len(texts)
            self._times.extend(ended - text.arrival for text in texts)
        for text, answer, is_late in zip(texts, answers, late, strict=True):
            text.request.put(text.index, answer, ratio, text.length, is_late)
        for request in dict.fromkeys(text.request for text in texts):
            if not request.missing:
                request.finish()

    def _fail(self, texts: list[_Text], error: BaseException) -> None:
        with self._wake:
            self._count(failed=len(texts))
        for request in dict.fromkeys(text.request for text in texts):
            request.fail(error)

    def _count(self, **more: float) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + by for name, by in more.items()})

    @property
    def waiting(self) -> int:
        """Texts that wait now."""
        with self._wake:
            return len(self._queue)

    @property
    def metrics(self) -> EngineMetrics:
        """What the engine has done so far; it stays readable when the engine is closed."""
        with self._wake:
            counts, times = self._counts, list(self._times)
            by_ratio, waiting = dict(sorted(self._by_ratio.items())), len(self._queue)
        latency = {}
        if len(times) > 1:
            cuts = statistics.quantiles(times, n=100, method="inclusive")
            latency = {f"p{percent}": 1000 * cuts[percent - 1] for percent in (50, 95, 99)}
        return replace(counts, waiting=waiting, texts_by_ratio=by_ratio, latency_ms=latency)

    # Its life

    @property
    def closed(self) -> bool:
        """Whether it takes no more questions."""
        return self._closing

    def close(self) -> None:
        """Answer what waits, and refuse what comes. Closing twice is closing once."""
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


def _checked_texts(texts: Any, name: str) -> list[str]:
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{name} is a {type(texts).__name__}; give a list of texts, also for a single one.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] is a {type(text).__name__}; give a list of texts.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}[{index}] is no valid Unicode: {error.reason}.") from error
    return list(texts)


def _checked_query(query: Any) -> str:
    return _checked_texts([query], "query")[0]


def _checked_slo(slo_ms: Any) -> float:
    if isinstance(slo_ms, bool) or not isinstance(slo_ms, (int, float)):
        raise TypeError(f"slo_ms={slo_ms!r} has to be a number of milliseconds.")
    if not slo_ms > 0:
        raise ValueError(f"slo_ms={slo_ms} has to be above 0; infinity means that there is no deadline.")
    return float(slo_ms)


def _check_limits(min_quality: Any, max_ratio: Any) -> None:
    if min_quality is not None:
        if isinstance(min_quality, bool) or not isinstance(min_quality, (int, float)):
            raise TypeError(f"min_quality={min_quality!r} has to be a number or None.")
        if math.isnan(min_quality):
            raise ValueError("min_quality is not a number; give the least quality, or None.")
    if max_ratio is not None:
        if isinstance(max_ratio, bool) or not isinstance(max_ratio, int):
            raise TypeError(f"max_ratio={max_ratio!r} has to be an integer or None.")
        if max_ratio < 1:
            raise ValueError(f"max_ratio={max_ratio} has to be at least 1, the base itself.")
