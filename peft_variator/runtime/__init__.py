"""Serving at the ratio that the load allows: a latency table, policies, and an engine that batches and chooses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .latency import LatencyCheck, LatencyTable, profile_latency, quality_from_card
    from .policies import POLICIES, FixedRatio, Oracle, Policy, QueueItem, QueueThreshold, SlackFit


__all__ = [
    "POLICIES",
    "FixedRatio",
    "LatencyCheck",
    "LatencyTable",
    "Oracle",
    "Policy",
    "QueueItem",
    "QueueThreshold",
    "SlackFit",
    "profile_latency",
    "quality_from_card",
]

# Where each name is, imported on first use.
_ROOMS = {
    "latency": ("LatencyCheck", "LatencyTable", "profile_latency", "quality_from_card"),
    "policies": ("POLICIES", "FixedRatio", "Oracle", "Policy", "QueueItem", "QueueThreshold", "SlackFit"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
