"""The engine inside of LitServe: OpenAI's `/v1/embeddings` and `/v1/models`, `/health`, and `/metrics` for Prometheus.

LitServe has the sockets, the processes and the specification of the endpoint. Its worker process holds one engine;
`EngineLoop` hands requests to it as they come, so that the engine alone batches, and knows how long each has waited.
Counters are kept in files that the processes share (prometheus_client's multiprocess mode).
"""

from __future__ import annotations

import base64
import logging
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from types import FrameType
from typing import Any, NoReturn, TextIO

import litserve
import prometheus_client
import torch
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from litserve.loops import LitLoop
from litserve.specs.openai_embedding import Embedding, EmbeddingRequest, EmbeddingResponse
from litserve.utils import LitAPIStatus, LoopResponseType, PickleableHTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.utils import logging as transformers_logging

from .engine_metrics import BatchRecord
from .queueing import EngineClosed, QueueFull
from .server import ServeSettings, make_engine


__all__ = ["EmbeddingSpec", "EngineAPI", "EngineLoop", "make_server"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05


class Metrics:
    """What Prometheus reads, with the names of Hugging Face's Text Embeddings Inference where it has them."""

    def __init__(self) -> None:
        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.requests = Counter("te_request_count", "Requests.", ["method"])
        self.succeeded = Counter("te_request_success", "Requests that were answered.", ["method"])
        self.failed = Counter("te_request_failure", "Requests that were refused or failed.", ["err"])
        self.duration = Histogram("te_request_duration", "Seconds of a request.", buckets=seconds)
        self.queued = Histogram("te_embed_queue_duration", "Seconds that a text waited.", buckets=seconds)
        self.computed = Histogram("te_embed_inference_duration", "Seconds of a batch.", buckets=seconds)
        self.waiting = Gauge("te_queue_size", "Texts that wait.", multiprocess_mode="livesum")
        self.batch_texts = Histogram("te_batch_next_size", "Texts in a batch.", buckets=sizes)
        self.batch_tokens = Histogram(
            "te_batch_next_tokens", "Tokens in a batch, padding included.", buckets=[64 * size for size in sizes]
        )
        self.texts = Counter("variator_texts", "Texts that were answered, by compression ratio.", ["ratio"])
        self.late = Counter("variator_late_texts", "Texts whose answers came after their deadlines.")

    def record(self, batch: BatchRecord) -> None:
        """Take in a batch that ran."""
        self.computed.observe(batch.seconds)
        for seconds in batch.waited:
            self.queued.observe(seconds)
        self.batch_texts.observe(batch.size)
        self.batch_tokens.observe(batch.size * batch.length)
        if not batch.failed:
            self.texts.labels(str(batch.ratio)).inc(batch.size)
            self.late.inc(batch.late)


class ServedRequest(EmbeddingRequest):
    """OpenAI's request, with what the engine can be asked for besides (`extra_body` of OpenAI's client)."""

    model_config = ConfigDict(extra="forbid")  # as OpenAI's own server refuses what it does not know

    model: str = ""
    # Strict: "2" and true are no numbers.
    slo_ms: float | None = Field(default=None, gt=0, strict=True)
    min_quality: float | None = Field(default=None, strict=True)
    max_ratio: int | None = Field(default=None, ge=1, strict=True)


class ServedEmbedding(Embedding):
    """OpenAI's embedding, with the compression ratio k that it was made at."""

    ratio: int


class ServedResponse(EmbeddingResponse):
    """OpenAI's response, with the ratios."""

    data: list[ServedEmbedding]  # a narrower kind, which is only read


def _with_ratio(found: Embedding, encoding_format: str) -> ServedEmbedding:
    """Take apart the numbers of an embedding and its ratio behind them, where the worker put it.

    Args:
        found: what LitServe made of a row of the worker's answer, which has no other room for it.
        encoding_format: `float` or `base64`, little-endian float32, which is what OpenAI's clients ask for.
    """
    *values, ratio = found.embedding
    embedding: list[Any] | str = values
    if encoding_format == "base64":
        embedding = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")
    return ServedEmbedding(index=found.index, embedding=embedding, ratio=round(float(ratio)))


class EmbeddingSpec(litserve.OpenAIEmbeddingSpec):
    """LitServe's OpenAI specification, with limits, `/v1/models` and `/metrics`. It lives in the HTTP process."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.started = int(time.time())
        self.add_endpoint("/v1/models", self.models_endpoint, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.model_endpoint, ["GET"])
        self.add_endpoint("/metrics", self.metrics_endpoint, ["GET"])

    @cached_property
    def metrics(self) -> Metrics:
        """Made in the process that counts."""
        return Metrics()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "metrics"}

    async def embeddings_endpoint(self, request: ServedRequest, context: Request) -> ServedResponse:
        """Answer `POST /v1/embeddings`."""
        context.state.is_counted = True
        texts = request.ensure_list()
        method = "batch" if isinstance(request.input, list) else "single"
        self.metrics.requests.labels(method).inc()
        started = time.monotonic()
        self._check(request, texts)
        # As a list, so that one text and a list of one are the same to the worker.
        as_list = request.model_copy(update={"input": texts, "encoding_format": "float"})
        response = await super().embeddings_endpoint(as_list)
        data = [_with_ratio(each, request.encoding_format) for each in response.data]
        self.metrics.succeeded.labels(method).inc()
        self.metrics.duration.observe(time.monotonic() - started)
        return ServedResponse(data=data, model=self.settings.served_name, usage=response.usage)

    async def options_embeddings(self, request: Request) -> Response:
        """Refuse `GET /v1/embeddings`, which LitServe answers with nothing."""
        raise HTTPException(405, f"{request.method} is not taken here; POST a text.", headers={"Allow": "POST"})

    def _check(self, request: ServedRequest, texts: Sequence[Any]) -> None:
        if not texts:
            raise HTTPException(422, "input is empty; give a text, or a list with at least one.")
        if not all(isinstance(text, str) for text in texts):
            raise HTTPException(422, "input has to be a text or a list of texts; token numbers are not taken.")
        if len(texts) > self.settings.max_texts:
            raise HTTPException(
                413,
                f"input has {len(texts)} texts; at most {self.settings.max_texts} are taken. Send fewer at a time.",
            )
        if request.dimensions is not None:
            raise HTTPException(422, "dimensions can't be chosen; leave it out, or cut the vectors yourself.")

    async def models_endpoint(self) -> dict[str, Any]:
        """Answer `GET /v1/models`."""
        return {"object": "list", "data": [self._model()]}

    async def model_endpoint(self, name: str) -> dict[str, Any]:
        """Answer `GET /v1/models/NAME`, of the one that is served."""
        if name != self.settings.served_name:
            raise HTTPException(404, f"There is no model {name!r}; {self.settings.served_name!r} is served.")
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.served_name,
            "object": "model",
            "created": self.started,
            "owned_by": "peft-variator",
        }

    async def metrics_endpoint(self) -> Response:
        """Answer `GET /metrics`."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def tell_error(self, request: Request, error: Exception) -> JSONResponse:
        """Answer with an error: `{"error": {"message": …}}`, where OpenAI's clients look for the message."""
        if isinstance(error, AnyHTTPException):
            status, message = error.status_code, str(error.detail)
        else:
            status, message = 422, _summary(error) if isinstance(error, RequestValidationError) else ""
        if request.url.path == self.api_path:
            if not getattr(request.state, "is_counted", False):  # the endpoint, which counts, was not reached
                self.metrics.requests.labels("invalid").inc()
            self.metrics.failed.labels(_FAILURES.get(status, "backend" if status >= 500 else "validation")).inc()
        kind = "server_error" if status == 429 or status >= 500 else "invalid_request_error"
        told = {"error": {"message": message, "type": kind, "param": None, "code": status}}
        return JSONResponse(told, status, headers=getattr(error, "headers", None))


# The names are those of Text Embeddings Inference.
_FAILURES = {429: "overloaded", 503: "overloaded", 504: "timeout"}


def _summary(error: RequestValidationError) -> str:
    """What is wrong with each field; `input` may be of several types, each of which has its own complaint."""
    found: dict[str, str] = {}
    for each in error.errors():
        name = next((place for place in each["loc"][1:] if isinstance(place, str)), "body")
        wrong = "has to be a text or a list of texts" if name == "input" and each["type"] != "missing" else each["msg"]
        if name == "body":
            wrong = "has to be a JSON object, sent with the header Content-Type: application/json"
        elif each["type"] == "extra_forbidden":
            wrong = "is no field; besides OpenAI's there are slo_ms, min_quality and max_ratio"
        found.setdefault(name, wrong)
    return " ".join(f"{name}: {message}." for name, message in found.items())


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Where in the code a warning was raised tells nothing to who started a server."""
    logger.warning("%s", message)


class EngineAPI(litserve.LitAPI):
    """The engine of a worker process."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(spec=EmbeddingSpec(settings), loop=EngineLoop())
        self.settings = settings
        self.ending = False

    def setup(self, device: str) -> None:
        """Load the model and measure it, if need be; called once, in the worker."""
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        # PEFT asks transformers for an attribute by its old name; who starts a server can do nothing about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.showwarning = _log_warning
        self.metrics = Metrics()
        try:
            self.engine = make_engine(self.settings, self.metrics.record)
        except (ImportError, OSError, TypeError, ValueError) as error:
            # The message says all; LitServe would put a traceback below it.
            logger.error("Error: %s", error)
            logging.getLogger("litserve").setLevel(logging.CRITICAL + 1)
            raise
        # Answers are sent from a thread of their own: the engine's has the next batch to run.
        self.sender = ThreadPoolExecutor(1)
        threading.Thread(target=self._tell_when_ready, daemon=True).start()
        # Ctrl-C reaches every process. The server ends this one when all requests are answered.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)

    def _tell_when_ready(self) -> None:
        """Say so when the process that has the sockets takes connections, which it does after this one is set up."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        while not self.ending:
            try:
                socket.create_connection((host, self.settings.port), timeout=1).close()
            except OSError:
                time.sleep(POLL_SECONDS)
            else:
                logger.warning("Ready: http://%s:%d/v1", self.settings.host, self.settings.port)
                return

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def predict(self, x: Any, **kwargs: Any) -> Any:
        """Not used: `EngineLoop` asks the engine."""
        raise NotImplementedError


class EngineLoop(LitLoop):
    """Hands requests to the engine as they come and answers them as they are done, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[tuple[int, Any], tuple[float, Future[Any]]] = {}

    def run(
        self,
        lit_api: EngineAPI,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: dict[int, str],
        callback_runner: Any,
    ) -> None:
        """Take one request, or let some time pass; LitServe calls it for ever.

        Raises:
            SystemExit: this process was told to end and has answered everything, or the server is gone.
        """
        now = time.monotonic()
        for request_id, (due, future) in list(self._open.items()):
            if due < now and self._open.pop(request_id, None) is not None:
                future.cancel()
                self._refuse(lit_api, transport, request_id, 504, "The request took too long.")
        lit_api.metrics.waiting.set(lit_api.engine.waiting)
        try:
            taken = self.get_request(request_queue, timeout=POLL_SECONDS)
        except (EOFError, ConnectionError):
            self._leave(lit_api)
        if taken is None or taken[1] is None:
            if lit_api.ending and not self._open:
                self._leave(lit_api)
            return
        response_queue_id, uid, came, request = taken
        self._submit(lit_api, transport, (response_queue_id, uid), came, request)

    def _leave(self, lit_api: EngineAPI) -> NoReturn:
        lit_api.engine.close()
        lit_api.sender.shutdown()
        raise SystemExit

    def _submit(
        self, lit_api: EngineAPI, transport: Any, request_id: tuple[int, Any], came: float, request: ServedRequest
    ) -> None:
        settings = lit_api.settings
        # The clock is one for all processes; what was lost on the way is lost from the slack.
        slo_ms = (request.slo_ms or settings.slo_ms) - 1000 * (time.monotonic() - came)
        try:
            future = lit_api.engine.submit(
                request.ensure_list(),
                slo_ms=max(slo_ms, 1e-3),
                min_quality=request.min_quality,
                max_ratio=request.max_ratio,
            )
        except QueueFull as error:
            self._refuse(lit_api, transport, request_id, 429, str(error))
        except EngineClosed as error:
            self._refuse(lit_api, transport, request_id, 503, str(error))
        except (TypeError, ValueError) as error:
            self._refuse(lit_api, transport, request_id, 422, str(error))
        except Exception as error:  # of one request; raised, it would end the process for all of them
            logger.exception("A request could not be queued.")
            self._refuse(lit_api, transport, request_id, 500, f"The request failed: {type(error).__name__}.")
        else:
            self._open[request_id] = (came + settings.timeout, future)
            future.add_done_callback(partial(self._answer, lit_api, transport, request_id))

    def _answer(self, lit_api: EngineAPI, transport: Any, request_id: tuple[int, Any], future: Future[Any]) -> None:
        """Send what the engine found, or that it failed."""
        if future.cancelled():
            return  # it was given up, and refused
        if (error := future.exception()) is not None:
            logger.error("A batch failed.", exc_info=error)
            if self._open.pop(request_id, None) is not None:
                self._refuse(lit_api, transport, request_id, 500, f"The batch failed: {type(error).__name__}.")
            return
        result = future.result()
        if not result.embeddings.isfinite().all():  # JSON has no such numbers, and nobody could use them
            logger.error("An embedding holds values that are not finite.")
            if self._open.pop(request_id, None) is not None:
                self._refuse(lit_api, transport, request_id, 500, "The model gave values that are not finite.")
            return
        tokens = sum(result.lengths)
        ratios = torch.tensor(result.ratios, dtype=result.embeddings.dtype).unsqueeze(1)
        rows = torch.cat([result.embeddings, ratios], 1).numpy()
        answer = {"embeddings": rows, "prompt_tokens": tokens, "total_tokens": tokens}
        lit_api.sender.submit(self._send, transport, request_id, answer, LitAPIStatus.OK)

    def _refuse(
        self, lit_api: EngineAPI, transport: Any, request_id: tuple[int, Any], status: int, message: str
    ) -> None:
        error = PickleableHTTPException(status, message)
        lit_api.sender.submit(self._send, transport, request_id, error, LitAPIStatus.ERROR)

    def _send(self, transport: Any, request_id: tuple[int, Any], answer: Any, status: LitAPIStatus) -> None:
        # Taken before it is sent, so that what was refused as too late isn't answered twice.
        if status == LitAPIStatus.OK and self._open.pop(request_id, None) is None:
            return
        self.put_response(transport, *request_id, answer, status, LoopResponseType.REGULAR)


def make_server(settings: ServeSettings) -> litserve.LitServer:
    """A LitServe server around an engine; `run` starts it."""
    kind, _, index = settings.device.partition(":")
    # Whoever asked is told; a request that is refused is no error of the server. Batches that fail are logged here.
    logging.getLogger(EmbeddingRequest.__module__).setLevel(logging.CRITICAL)
    api = EngineAPI(settings)
    server = litserve.LitServer(
        api,
        accelerator=kind,
        devices=[int(index or 0)] if kind != "cpu" else 1,
        timeout=settings.timeout,
        max_payload_size=settings.max_bytes,
    )
    for kind_of_error in (AnyHTTPException, RequestValidationError):
        server.app.add_exception_handler(kind_of_error, api.spec.tell_error)
    return server
