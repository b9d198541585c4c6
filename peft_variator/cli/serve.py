"""The `serve` command: what can be checked before a server starts is checked here, then it runs."""

from __future__ import annotations

import math
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..files import check_new_file
from ..model_files import read_model_config
from ..models import main_input
from ..profiling import find_device
from .console import Reporter
from .saved_plugin import open_plugin


__all__ = ["serve"]

NEEDED = ("litserve", "prometheus_client")


def serve(reporter: Reporter, *, device: str | None, **settings: Any) -> None:
    """Serve until the process is told to end.

    Args:
        reporter: where the address is told.
        device: name of a torch device; `None`: a GPU if there is one.
        settings: see [`ServeSettings`].

    Raises:
        ImportError: the extra is not installed.
        OSError: the model, the plugin, the table or the port can't be used.
        ValueError: a setting is out of range.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Serving needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. Run: "
            "pip install 'peft-variator[serve]'"
        )
    for name in ("slo_ms", "timeout"):
        if not 0 < settings[name] < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {settings[name]}; it has to be above 0, and finite.")
    other = main_input(read_model_config(settings["model"]))
    if other in ("images", "sound"):
        raise ValueError(f"{settings['model']} takes {other}, and the server takes texts: name a text encoder.")
    if settings["adapter"] is not None:
        open_plugin(settings["adapter"], settings["model"])
    if settings["max_texts"] > settings["max_queue"]:
        raise ValueError(
            f"--max-texts is {settings['max_texts']} and --max-queue {settings['max_queue']}: a request of more texts "
            "than may wait could never be taken. Give a larger --max-queue, or a smaller --max-texts."
        )
    if settings["table"] is not None and Path(settings["table"]).is_dir():
        raise ValueError(f"--table {settings['table']} is a folder. Name a file, there or new.")
    if settings["table"] is not None and not Path(settings["table"]).exists():
        check_new_file(settings["table"])
    if device is not None:
        find_device(device)
    _check_port(settings["host"], settings["port"])
    from ..runtime import server

    chosen = server.ServeSettings(device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **settings)
    measuring = []
    if chosen.adapter and chosen.policy == server.SlackFit.name and not (chosen.table and Path(chosen.table).exists()):
        kept = f"kept in {chosen.table}" if chosen.table else "--table FILE keeps it for the next start"
        measuring = [f"A latency table is measured first, which takes minutes, of larger models more; {kept}."]
    reporter.say(
        f"Loading {chosen.model}" + (f" with {chosen.adapter}" if chosen.adapter else "") + ".",
        *measuring,
        f"Serving on http://{chosen.host}:{chosen.port}/v1 when it is there, which a line will say; Ctrl-C ends.",
    )
    try:
        server.serve(chosen)
    except (EOFError, RuntimeError) as error:  # a worker could not start, or died
        raise ValueError(f"{chosen.model} can't be served; the reason stands above.") from error


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"Port {port} of {host} can't be used: {error.strerror}. Name another with --port."
            ) from error
