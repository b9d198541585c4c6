"""Serving at the ratio that the load allows: a latency table, policies, and an engine that batches and chooses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .engine import Engine
    from .engine_metrics import BatchRecord, EngineMetrics
    from .latency import LatencyCheck, LatencyTable
    from .policies import POLICIES, FixedRatio, Oracle, Policy, QueueItem, QueueThreshold, SlackFit
    from .profile import profile_latency, quality_from_card
    from .queueing import EngineClosed, Limits, QueueFull
    from .server import ServeSettings, make_engine
    from .simulator import RecordedLatencies, Simulation, simulate
    from .tasks import Classifications, Embeddings, Prefilled, Scores


__all__ = [
    "POLICIES",
    "BatchRecord",
    "Classifications",
    "Embeddings",
    "Engine",
    "EngineClosed",
    "EngineMetrics",
    "FixedRatio",
    "LatencyCheck",
    "LatencyTable",
    "Limits",
    "Oracle",
    "Policy",
    "Prefilled",
    "QueueFull",
    "QueueItem",
    "QueueThreshold",
    "RecordedLatencies",
    "Scores",
    "ServeSettings",
    "Simulation",
    "SlackFit",
    "make_engine",
    "profile_latency",
    "quality_from_card",
    "simulate",
]

# Where each name is, imported on first use.
_ROOMS = {
    "engine": ("Engine",),
    "latency": ("LatencyCheck", "LatencyTable"),
    "engine_metrics": ("BatchRecord", "EngineMetrics"),
    "policies": ("POLICIES", "FixedRatio", "Oracle", "Policy", "QueueItem", "QueueThreshold", "SlackFit"),
    "profile": ("profile_latency", "quality_from_card"),
    "queueing": ("EngineClosed", "Limits", "QueueFull"),
    "server": ("ServeSettings", "make_engine"),
    "simulator": ("RecordedLatencies", "Simulation", "simulate"),
    "tasks": ("Classifications", "Embeddings", "Prefilled", "Scores"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
