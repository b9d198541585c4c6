"""The most memory that this process holds while something runs, from Linux's own count."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType


__all__ = ["PeakMemory"]

STATUS = Path("/proc/self/status")
INTERVAL = 0.005


class PeakMemory:
    """A context manager that looks every 5 ms at what the process holds.

    `resident` counts the pages of mapped files that were touched, `anonymous` leaves them out. Weights that need no
    conversion stay such pages, so that only `resident` counts them. Both are bytes, at their peak.
    """

    def __init__(self) -> None:
        self.anonymous = self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        lines = (line.split(":") for line in STATUS.read_text().splitlines())
        kilobytes = {name: int(value.split()[0]) for name, value in lines if name in ("RssAnon", "VmRSS")}
        self.anonymous = max(self.anonymous, 1024 * kilobytes["RssAnon"])
        self.resident = max(self.resident, 1024 * kilobytes["VmRSS"])
