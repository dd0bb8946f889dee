"""
The history of a W&B run by W&B's own HTTP interface: the last resort, 15 s and more behind the run.

One GraphQL request a poll: the newest step and one page of rows from where the last one ended. Promises to
keep away for as long as the server asks (429, `Retry-After`, `RateLimit-Reset`) and with growing gaps after
failures, to read no more than a bounded answer, and never to show the key. A failure that passes gives no
rows and a note; StreamError is for what a person has to change. Rows without a step that W&B gave them cannot
be asked for. A poll waits for the network, up to `timeout_s`: it belongs in a thread.
"""

import json
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from stepguardd.sources.reward.jsonl import rows_of
from stepguardd.sources.reward.rows import Notes, Position, Row, StreamError, offset_in
from stepguardd.sources.reward.wandb_records import GLOBAL_STEP

if TYPE_CHECKING:
    import httpx

BASE_URL = "https://api.wandb.ai"
PAGE_STEPS = 500
ANSWER_BYTES_MAX = 16 * 1024 * 1024
GAP_MAX_S = 300.0

_QUERY = """
query StepguardHistory($entity: String!, $project: String!, $run: String!, $from: Int64!, $to: Int64!, $size:
Int!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { state historyKeys history(minStep: $from, maxStep: $to, samples: $size) }
  }
}
"""


class _LaterError(Exception):
    """It did not work now; the server may have said when to come back."""

    def __init__(self, why: str, asked_s: float | None = None) -> None:
        super().__init__(why)
        self.asked_s = asked_s


class WandbApi:
    """Follows a run `entity/project/run_id`; see `rows.Reader`. Keeping away, `poll` returns at once."""

    def __init__(
        self,
        run: str,
        *,
        key: str,
        step_key: str | None = None,
        base_url: str = BASE_URL,
        period_s: float = 15.0,
        timeout_s: float = 10.0,
        position: Mapping[str, object] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        parts = run.split("/")
        if len(parts) != 3 or not all(parts):
            raise StreamError(f"{run!r} is no W&B run; write entity/project/run_id")
        self._run = run
        self._entity, self._project, self._run_id = parts
        self._key = key
        self._step_key = step_key
        self._url = base_url.rstrip("/") + "/graphql"
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._notes = Notes()
        self._next_step = offset_in(position, "next_step") if position else 0
        self._not_before = 0.0
        self._failures = 0
        self._caught_up = False
        self._state = ""
        self._client: httpx.Client | None = None

    @property
    def position(self) -> Position:
        """The lowest W&B step that was not read yet."""
        return {"next_step": self._next_step}

    @property
    def caught_up(self) -> bool:
        """Whether the last page reached the newest step, or the server cannot be asked now."""
        return self._caught_up

    @property
    def finished(self) -> bool:
        """Whether W&B calls the run finished, and all of it was read."""
        return self._caught_up and self._state == "finished"

    @property
    def due_s(self) -> float:
        """Seconds until a poll asks the server again."""
        return max(0.0, self._not_before - self._clock())

    def poll(self) -> tuple[Row, ...]:
        """Read one page; see `rows.Reader`."""
        if self.due_s > 0:
            self._caught_up = True
            return ()
        try:
            answer = self._ask()
        except _LaterError as later:
            self._put_off(later)
            return ()
        self._failures = 0
        return self._page(answer)

    def notes(self) -> tuple[str, ...]:
        """See `rows.Reader`."""
        return self._notes.take()

    def unfinished(self) -> tuple[str, ...]:
        """See `rows.Reader`. W&B's word on a run rests on heartbeats: it can be wrong both ways."""
        return (
            ()
            if self._state == "finished"
            else (f"{self._run}: W&B calls the run {self._state or 'unknown'}",)
        )

    def advice(self) -> str | None:
        """See `rows.Reader`."""
        return "W&B's servers have a row 15 s after it was logged at best; read the run's local file instead"

    def close(self) -> None:
        """See `rows.Reader`."""
        if self._client is not None:
            self._client.close()

    def _ask(self) -> object:
        """Send the query and return the decoded answer; raises _LaterError when it has to be tried again."""
        import httpx  # noqa: PLC0415 - 16 MB that only this reader needs

        if self._client is None:
            self._client = httpx.Client(
                timeout=self._timeout_s, auth=("api", self._key), follow_redirects=False
            )
        variables = {
            "entity": self._entity,
            "project": self._project,
            "run": self._run_id,
            "from": self._next_step,
            "to": self._next_step + PAGE_STEPS,
            "size": PAGE_STEPS,
        }
        try:
            with self._client.stream(
                "POST", self._url, json={"query": _QUERY, "variables": variables}
            ) as reply:
                body = b""
                for piece in reply.iter_bytes():
                    body += piece
                    if len(body) > ANSWER_BYTES_MAX:
                        raise _LaterError(f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as failed:
            raise _LaterError(str(failed) or type(failed).__name__) from None
        if reply.status_code in {401, 403, 404}:
            raise StreamError(
                f"{self._run}: W&B answers {reply.status_code}; check the run's name and the key's rights"
            )
        if reply.status_code != 200:
            raise _LaterError(f"HTTP {reply.status_code}", _wait_asked(reply.headers))
        self._keep_away(
            _wait_asked(reply.headers) if reply.headers.get("RateLimit-Remaining") == "0" else None
        )
        try:
            answer: object = json.loads(body)
        except (ValueError, RecursionError):
            raise _LaterError("the answer is no JSON") from None
        return answer

    def _keep_away(self, asked_s: float | None) -> None:
        self._not_before = self._clock() + max(self._period_s, asked_s or 0.0)

    def _put_off(self, later: "_LaterError") -> None:
        """Note a failure that passes and arrange the next try."""
        self._caught_up = True
        self._failures += 1
        gap_s = min(self._period_s * 2 ** min(self._failures - 1, 8), GAP_MAX_S)
        self._not_before = self._clock() + max(gap_s, later.asked_s or 0.0)
        self._notes.add(f"{self._run}: W&B could not be read: {later}")

    def _page(self, answer: object) -> tuple[Row, ...]:
        run = _at(answer, "data", "project", "run")
        if not isinstance(run, dict):
            complaint = _at(answer, "errors")
            if complaint:
                raise StreamError(f"{self._run}: W&B refuses the query: {str(complaint)[:200]}")
            raise StreamError(f"{self._run}: W&B knows no such run; write entity/project/run_id")
        self._state = str(run.get("state") or "")
        lines = run.get("history")
        rows: list[Row] = []
        newest_read, end = self._next_step - 1, self._next_step + PAGE_STEPS
        for line in lines if isinstance(lines, list) else []:
            record = _decoded(line)
            if record is None:
                self._notes.add(f"{self._run}: a row of the history is no JSON object; left out")
                continue
            step = record.get("_step")
            if isinstance(step, int) and not isinstance(step, bool):
                if not self._next_step <= step < end:
                    continue
                newest_read = max(newest_read, step)
            key = self._step_key or (GLOBAL_STEP if record.get(GLOBAL_STEP) is not None else "_step")
            rows.extend(rows_of(record, key))
        newest = _at(run, "historyKeys", "lastStep")
        last = newest if isinstance(newest, int) else newest_read
        self._next_step = end if last >= end else newest_read + 1
        self._caught_up = last < end
        if not self._caught_up:
            self._not_before = self._clock()
        return tuple(rows)


def _at(value: object, *path: str) -> object:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _decoded(line: object) -> dict[str, object] | None:
    try:
        record = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _wait_asked(headers: Mapping[str, str]) -> float | None:
    """Read how long the server wants to be left alone, in seconds: `Retry-After`, else `RateLimit-Reset`."""
    for name in ("Retry-After", "RateLimit-Reset"):
        try:
            return min(max(float(headers[name]), 0.0), 3600.0)
        except (KeyError, ValueError):
            continue
    return None
