"""What a server serves: its settings, the engine that is made from them, and starting it.

What it is hosted by is in `lit_server`, which needs the extra `serve`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from ..model_files import check_model_name, load_tokenizer
from ..models import load_whole
from ..pooling import check_pooling
from ..profiling import count_positions, describe_environment
from ..sentence_folder import read_recipe
from ..training import load_plugin
from .engine import Engine, check_max_length
from .engine_metrics import BatchRecord
from .latency import LatencyTable
from .policies import MAX_BATCH, FixedRatio, Policy, QueueThreshold, SlackFit
from .profile import name_of, profile_latency, quality_from_card
from .tasks import find_transformer


__all__ = ["ServeSettings", "make_engine", "serve"]

logger = logging.getLogger(__name__)

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's name for it
DEFAULT_RATIOS = (1, 2, 4, 8)
BATCH_SIZES = (1, 4, 16, 64)
LENGTHS = (4, 64, 256)
TIMES_DEPEND_ON = ("model", "device", "gpu", "cpu", "threads")
TOLD_EVERY = 10.0  # seconds between lines about what is measured
SAME_WORD = 1.0  # seconds in which a second signal is the first one, passed on
RESERVE_MS = 2.0  # for what lies around the engine: queues between processes, JSON


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and how.

    Args:
        model: folder of the base, or its name on the Hub.
        adapter: folder of a Variator plugin, or its name on the Hub; `None`: the base alone.
        slo_ms: milliseconds in which a request is to be answered.
        policy: `slack-fit`, `threshold` or `fixed`.
        ratios: compression ratios to choose from; `None`: those that the plugin was trained for.
        table: file of the latency table, measured and written there if it does not exist; `None`: measured anew.
        batch_size: most texts in a batch.
        max_queue: most texts that may wait; beyond it requests get status 429.
        max_texts: most texts in a request.
        max_length: most tokens of a text; `None`: as many as the model takes.
        max_bytes: largest body of a request.
        timeout: seconds after which a request gets status 504.
        pooling: as in [`Engine`].
        normalize: as in [`Engine`].
        device: name of a torch device.
        dtype: `float32`, `bfloat16` or `float16`.
        host: `127.0.0.1`, `0.0.0.0` or `::`.
        port: 1024 to 65535.
        name: what `/v1/models` calls the model; `None`: as `model`.

    Raises:
        ValueError: settings that do not go together, or a pooling that is not known.
    """

    model: str
    adapter: str | None = None
    slo_ms: float = 50.0
    policy: str = SlackFit.name
    ratios: tuple[int, ...] | None = None
    table: str | None = None
    batch_size: int = MAX_BATCH
    max_queue: int = 1024
    max_texts: int = 256
    max_length: int | None = None
    max_bytes: int = 4 << 20
    timeout: float = 30.0
    pooling: str | None = None
    normalize: bool | None = None
    device: str = "cpu"
    dtype: str = "float32"
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None

    def __post_init__(self) -> None:
        if self.policy not in (SlackFit.name, QueueThreshold.name, FixedRatio.name):
            raise ValueError(f"policy={self.policy!r} is not served; choose slack-fit, threshold or fixed.")
        if self.adapter is None and (self.ratios or self.policy == FixedRatio.name):
            raise ValueError("Ratios and the policy 'fixed' need a plugin: name it with --adapter.")
        if self.policy == FixedRatio.name and len(self.ratios or ()) != 1:
            raise ValueError("The policy 'fixed' needs one ratio: --ratio 4, say.")
        if self.pooling is not None:
            check_pooling(self.pooling)

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or self.model


def serve(settings: ServeSettings) -> None:
    """Serve until the process is told to end (SIGINT or SIGTERM); what was taken is answered first.

    Told once more, a second later or more, it ends at once: what it has taken is lost. Sooner than that it is the same
    word, which a terminal gives to a process and what runs it passes on.

    For a process that does nothing else: prometheus_client reads when it is imported that several processes count
    together, so it must not have been imported before.

    Raises:
        ImportError: the extra `serve` is not installed.
        KeyboardInterrupt: the process was told to end before it served.
        OSError: the port is in use.
        RuntimeError: the model can't be served; the reason is on the error stream.
    """
    server_process = os.getpid()
    told: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        # Children that are forked inherit this; they end when the server says so, after they have answered.
        if os.getpid() != server_process:
            return
        if told is None:
            told = time.monotonic()
            # LitServe watches its workers, and would report that they end.
            logging.getLogger("litserve.server").setLevel(logging.CRITICAL)
            raise KeyboardInterrupt
        # Raised again, it would fall into LitServe's wait for the answers, which then never come.
        if time.monotonic() - told >= SAME_WORD:
            for child in multiprocessing.active_children():
                child.kill()
            shutil.rmtree(os.environ[METRICS_FOLDER], ignore_errors=True)
            os._exit(128 + number)

    with tempfile.TemporaryDirectory(prefix="peft-variator-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        from .lit_server import make_server

        server = make_server(settings)
        try:
            server.run(
                host=settings.host,
                port=settings.port,
                num_api_servers=1,
                generate_client_file=False,
                log_level="warning",
            )
        except BaseException:
            for worker in getattr(server, "inference_workers", ()):  # one that still loads would go on
                worker.terminate()
            raise


def make_engine(settings: ServeSettings, on_batch: Callable[[BatchRecord], object] | None = None) -> Engine:
    """Load what is served, and make its engine.

    Raises:
        OSError: a folder or a file is not there.
        ValueError: the parts do not fit together.
    """
    model, tokenizer = _load(settings)
    check_max_length(settings.max_length, tokenizer)  # before minutes go into measuring
    return Engine(
        model,
        tokenizer,
        _make_policy(settings, model),
        slo_ms=settings.slo_ms,
        max_queue=settings.max_queue,
        pooling=settings.pooling,
        normalize=settings.normalize,
        max_length=None if tokenizer is None else settings.max_length,
        on_batch=on_batch,
    )


def _load(settings: ServeSettings) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The model with its plugin, and its tokenizer; no tokenizer for what only sentence-transformers can run."""
    check_model_name(settings.model)
    dtype = getattr(torch, settings.dtype)
    if read_recipe(settings.model).unknown and (settings.pooling is None or settings.normalize is None):
        from sentence_transformers import SentenceTransformer

        sentences: Any = SentenceTransformer(settings.model, device=settings.device, model_kwargs={"dtype": dtype})
        if settings.adapter is not None:
            sentences.load_adapter(settings.adapter)
        if settings.max_length is not None:
            sentences.max_seq_length = min(settings.max_length, sentences.max_seq_length or settings.max_length)
        return sentences, None
    config = AutoConfig.from_pretrained(settings.model)
    base = load_whole(AutoModel, settings.model, pooler=False, config=config, dtype=dtype).to(settings.device)
    model = base if settings.adapter is None else load_plugin(base, settings.adapter, is_trainable=False)
    return model, load_tokenizer(settings.model)


def _make_policy(settings: ServeSettings, model: nn.Module) -> Policy:
    if settings.adapter is None:
        return FixedRatio(1, settings.batch_size)
    if settings.policy == FixedRatio.name:
        (k,) = settings.ratios or ()
        return FixedRatio(k, settings.batch_size)
    trained = _trained_ratios(model)
    ratios = settings.ratios or trained or DEFAULT_RATIOS
    if settings.policy == QueueThreshold.name:
        steps = {k: 8 << index for index, k in enumerate(sorted({*ratios} - {1}))}
        return QueueThreshold(steps, settings.batch_size)
    table = _read_table(settings, model, trained) or _measure_table(settings, model, ratios)
    return SlackFit(table, max_batch=settings.batch_size, reserve_ms=RESERVE_MS)


def _read_table(settings: ServeSettings, model: nn.Module, trained: Sequence[int] | None) -> LatencyTable | None:
    """The latency table in its file, if there is one: with the ratios that were named, or trained, alone."""
    path = settings.table
    if path is None or not Path(path).exists():
        return None
    table = LatencyTable.load(path)
    longest = _lengths(settings, model)[-1]
    if table.lengths[-1] < longest:
        logger.warning(
            "%s was measured up to %d tokens, and longer texts are served: what they take is extrapolated. Remove it "
            "to measure up to %d.",
            path,
            table.lengths[-1],
            longest,
        )
    if differences := _differences(table, model):
        logger.warning(
            "%s was measured with %s. Its times are used all the same; remove it to measure anew.",
            path,
            ", ".join(differences),
        )
    missing = sorted({*(settings.ratios or ())} - {*table.ratios})
    if missing:
        raise ValueError(f"{path} has no ratios {missing}, only {list(table.ratios)}. Remove it to measure anew.")
    kept = settings.ratios or [k for k in table.ratios if trained is None or k in trained]
    if not kept:
        raise ValueError(
            f"{path} has the ratios {list(table.ratios)}, and the plugin was trained for {list(trained or ())}. "
            "Remove it to measure anew, or name some with --ratio."
        )
    return table.restrict(kept)  # what was measured besides is not to be chosen


def _differences(table: LatencyTable, model: nn.Module) -> list[str]:
    """What a table was measured with that times depend on and that is another here, in words."""
    inner = find_transformer(model)
    before = {**table.environment, "model": table.model}
    now = {**describe_environment(inner.device), "model": name_of(inner)}
    return [
        f"{key} {before[key]} (here {now.get(key)})"
        for key in TIMES_DEPEND_ON
        # Of a model the folder may be another one.
        if before.get(key) and Path(str(before[key])).name != Path(str(now.get(key))).name
    ]


def _measure_table(settings: ServeSettings, model: nn.Module, ratios: Sequence[int]) -> LatencyTable:
    """The latency table, measured now and written to its file, if one is named."""
    path, lengths = settings.table, _lengths(settings, model)
    known = (quality_from_card(settings.adapter) if settings.adapter else None) or {}
    quality = {k: value for k, value in known.items() if k in (1, *ratios)} or None
    sizes = [*(size for size in BATCH_SIZES if size < settings.batch_size), settings.batch_size]
    table = profile_latency(
        model, ratios, sizes, lengths, quality=quality, rounds=3, min_seconds=0.02, on_step=_ProgressLines(logger)
    )
    if path is not None:
        table.save(path)
    return table


def _lengths(settings: ServeSettings, model: nn.Module) -> list[int]:
    """The lengths of texts that are measured, as far as texts of that length are served."""
    bounds = [bound for bound in (count_positions(find_transformer(model).config), settings.max_length) if bound]
    return sorted({min((length, *bounds)) for length in LENGTHS})


class _ProgressLines:
    """Tells now and then how many latencies have been measured: a worker has no terminal to draw a bar on."""

    def __init__(self, log: logging.Logger) -> None:
        self.log, self.samples, self.told = log, 0, time.monotonic()

    def __call__(self) -> None:
        """Count a timed sample."""
        self.samples += 1
        now = time.monotonic()
        if now - self.told >= TOLD_EVERY:
            self.told = now
            self.log.warning("Measuring latencies: %d samples so far.", self.samples)


def _trained_ratios(model: nn.Module) -> Sequence[int] | None:
    models = (model, find_transformer(model))  # transformers' own loader keeps plugins on the transformer
    configs = [config for each in models for config in (getattr(each, "peft_config", None) or {}).values()]
    return next((each.trained_ratios for each in configs if getattr(each, "trained_ratios", None)), None)
