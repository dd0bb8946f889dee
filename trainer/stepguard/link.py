"""
The guard's end of the wire: the gate page and the report socket, in whatever state they are.

Promise: nothing in here raises, blocks or fills the log. A page that is missing, foreign, read-only or was
replaced by a restarted daemon is said once and looked for again; where there is none, reads find nothing
and writes go nowhere.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from stepguard.gate import (
    PAGE_BYTES,
    SEQUENCE_WORD,
    DaemonHalf,
    GateError,
    GatePage,
    NoPage,
    TrainerHalf,
    Unreachable,
)
from stepguard.reports import Report, ReportSender

PAGE_NAME: Final = "gate"
SOCKET_NAME: Final = "reports.sock"


class OnceLog:
    """Says each thing once, until it has changed."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[str] = set()

    def once(self, key: str, message: str, *values: object, level: int = logging.WARNING) -> None:
        """Log under this key unless it was said."""
        if key not in self._said:
            self._said.add(key)
            self._logger.log(level, message, *values)

    def over(self, key: str, message: str, *values: object) -> None:
        """Log the end of what was said under this key, if it was; the next time it is said again."""
        if key in self._said:
            self._said.remove(key)
            self._logger.warning(message, *values)


class Link:
    """
    One trainer's link to one daemon.

    Args:
        run_dir: where page and socket are; None is no link at all.
        log: where troubles are said.
        boot_id: 16 bytes, for tests; the kernel's by default.
        writable: False: read orders alone, show nothing and report nothing.

    Attributes:
        words: the page's words to read; zeros without a page.
        out_words: the page's words to write; of no effect without a page that can be written.

    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        log: OnceLog,
        boot_id: bytes | None = None,
        writable: bool = True,
    ) -> None:
        self._path = None if run_dir is None else run_dir / PAGE_NAME
        self._log = log
        self._boot_id = boot_id
        self._writable = writable
        self._page: GatePage | None = None
        self._sender = None if run_dir is None or not writable else ReportSender(run_dir / SOCKET_NAME)
        self._dropped = 0
        self._nowhere = [0] * (PAGE_BYTES // 8)
        self.words: memoryview | list[int] = self._nowhere
        self.out_words: memoryview | list[int] = self._nowhere

    @property
    def has_page(self) -> bool:
        """Whether a page is mapped."""
        return self._page is not None

    @property
    def dropped(self) -> int:
        """Reports that did not go."""
        return self._dropped if self._sender is None else self._sender.dropped

    def refresh(self) -> bool:
        """Map the page if there is none or another lies in its place; True when a new one was mapped."""
        if self._path is None or (self._page is not None and not self._page.replaced()):
            return False
        try:
            page = self._opened(self._path)
        except GateError as error:
            if self._page is None or not isinstance(error, NoPage):
                self._log.once(f"page {type(error).__name__}", "%s; training goes on without it", error)
            return False
        # The page before is let go, not closed: another thread may be reading it at this instant.
        self._page = page
        self.words = page.words
        self.out_words = page.words if page.writable else self._nowhere
        return True

    def daemon(self) -> DaemonHalf | None:
        """The daemon's half, None if unknown."""
        half = None if self._page is None else self._page.daemon()
        if self._page is not None and half is None and self._page.words[SEQUENCE_WORD]:
            self._log.once(
                "unreadable", "the gate page %s does not check out; waiting for the next order", self._path
            )
        elif half is not None:
            self._log.over("unreadable", "the gate page %s checks out again", self._path)
        return half

    def trainer(self) -> TrainerHalf | None:
        """What a trainer on this page said last, None if unknown."""
        return None if self._page is None else self._page.trainer()

    def show(self, half: TrainerHalf) -> None:
        """Put the trainer's half on the page."""
        if self._page is not None and self._page.writable:
            self._page.report(half)

    def send(self, report: Report) -> bool:
        """Send a report; False when it did not go."""
        if self._sender is None:
            return False
        sent = self._sender.send(report)
        if sent:
            self._log.over("reports", "reports go out again; %d were dropped", self._sender.dropped)
        elif self._page is not None:
            self._log.once("reports", "reports are dropped and counted: %s", self._sender.last_error)
        return sent

    def close(self) -> None:
        """Let go of page and socket."""
        self._page = None
        self.words = self.out_words = self._nowhere
        self._path = None
        if self._sender is not None:
            self._dropped = self._sender.dropped
            self._sender.close()
            self._sender = None

    def _opened(self, path: Path) -> GatePage:
        """The page, to be written if that is wanted and can be had, else to be read: orders count alike."""
        if not self._writable:
            return GatePage.open(path, writable=False, boot_id=self._boot_id)
        try:
            return GatePage.open(path, boot_id=self._boot_id)
        except Unreachable as error:
            page = GatePage.open(path, writable=False, boot_id=self._boot_id)
            self._log.once("read-only", "%s; orders are obeyed, the daemon does not see this trainer", error)
            return page
