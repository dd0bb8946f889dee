"""
What a line of a log can mean: one table of signatures, each with an example that its test reads.

A signature is a needle, bytes that must be in the line, and where those are not enough, a pattern whose named
groups become the facts. A signature is a hint, never a verdict: "fired up and ready to roll" is printed by
servers that are not ready. SGLang's lines are of 0.5.23, most of them seen, some read in its source; the
others are from the tools' own sources and documentation. Nothing here reads a file: see `logs`.
"""

# ruff: noqa: E501 - the table quotes whole lines of logs

import re
from dataclasses import dataclass

from stepguardd.core.signs import Sign


@dataclass(frozen=True, slots=True)
class Signature:
    """One row of the table; `pattern` is searched in the lines that hold the needle."""

    sign: Sign
    needle: bytes
    pattern: re.Pattern[bytes] | None
    example: str

    def facts(self, line: bytes) -> dict[str, str] | None:
        """Return what the line says beyond its meaning; None when it does not match after all."""
        if self.needle not in line:
            return None
        if self.pattern is None:
            return {}
        match = self.pattern.search(line)
        if match is None:
            return None
        return {
            name: value.decode("utf-8", "replace")
            for name, value in match.groupdict().items()
            if value is not None
        }


def _row(sign: Sign, needle: str, example: str, pattern: str | None = None) -> Signature:
    return Signature(sign, needle.encode(), re.compile(pattern.encode()) if pattern else None, example)


_SIZE = r"\d{1,9}(?:\.\d{1,9})? [KMGT]iB"

SIGNATURES: tuple[Signature, ...] = (
    # SGLang, in the order of a server's life.
    _row(
        Sign.STARTING,
        "server_args=ServerArgs(",
        "[2026-11-20 10:00:00] server_args=ServerArgs(model_path='/m', ...)",
    ),
    _row(
        Sign.READY,
        "The server is fired up and ready to roll!",
        "[…] The server is fired up and ready to roll!",
    ),
    _row(
        Sign.START_FAILED,
        "died during initialization",
        "Rank 0 scheduler died during initialization (exit code: -9). If exit code is -9 (SIGKILL), a common cause is the OS OOM killer.",
        r"Rank (?P<rank>\d{1,9}) scheduler died during initialization \(exit code: (?P<code>-?\d{1,9})\)",
    ),
    _row(
        Sign.START_FAILED,
        "Initialization failed. warmup error:",
        "Initialization failed. warmup error: Traceback …",
    ),
    _row(
        Sign.START_FAILED,
        "Received sigquit from a child process",
        "Received sigquit from a child process. It usually means the child failed.",
    ),
    _row(
        Sign.PORT_TAKEN,
        "error while attempting to bind on address",
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use",
        r"bind on address \('(?P<host>[^']{1,64})', (?P<port>\d{1,5})\)",
    ),
    _row(
        Sign.SCHEDULER_CRASHED,
        "Subprocess scheduler",
        "[…] Subprocess scheduler_0 (pid=4242) crashed with exit code -9. Triggering SIGQUIT for cleanup...",
        r"Subprocess scheduler_?(?P<rank>\d{0,9}) \(pid=(?P<pid>\d{1,9})\) crashed with exit code (?P<code>-?\d{1,9})",
    ),
    _row(
        Sign.DETOKENIZER_CRASHED,
        "Subprocess detokenizer",
        "[…] Subprocess detokenizer (pid=4243) crashed with exit code -11. Triggering SIGQUIT for cleanup...",
        r"Subprocess detokenizer\S{0,20} \(pid=(?P<pid>\d{1,9})\) crashed with exit code (?P<code>-?\d{1,9})",
    ),
    _row(
        Sign.SCHEDULER_EXCEPTION,
        "Scheduler hit an exception",
        "[…] Scheduler hit an exception: Traceback (most …",
    ),
    _row(
        Sign.SCHEDULER_HUNG,
        "watchdog timeout (",
        "[…] Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
        r"(?P<who>\w{1,40}) watchdog timeout \(self\.watchdog_timeout=(?P<seconds>[\d.]{1,12}), self\.soft=(?P<soft>\w{4,5})\)",
    ),
    _row(
        Sign.CHILD_FAILED,
        "SIGQUIT received.",
        "[…] SIGQUIT received. signum=None, frame=None. It usually means one child failed.",
    ),
    _row(
        Sign.CRASH_DIAGNOSTICS,
        "before crash diagnostics",
        "[…] Sleeping 5 seconds before crash diagnostics to let GPU activity settle.",
    ),
    _row(
        Sign.CRASH_DIAGNOSTICS,
        "seconds for CUDA coredumps",
        "[…] Waiting 60.0 seconds for CUDA coredumps before exiting.",
    ),
    _row(
        Sign.HEALTH_FAILED,
        "Health check failed. Server couldn't get a response",
        "[…] Health check failed. Server couldn't get a response from detokenizer for last 20 seconds.",
        r"for last (?P<seconds>[\d.]{1,9}) seconds",
    ),
    _row(
        Sign.DRAINING,
        "Draining requests and shutting down",
        "[…] SIGTERM received. signum=None frame=None. Draining requests and shutting down...",
    ),
    _row(
        Sign.DRAINING,
        "Gracefully exiting... Remaining number of requests",
        "[…] Gracefully exiting... Remaining number of requests 3. Remaining requests remaining_rids=[…]",
        r"Remaining number of requests (?P<left>\d{1,9})",
    ),
    _row(
        Sign.FORCED_EXIT,
        "while health check failed. Force exiting",
        "Signal SIGTERM received while health check failed. Force exiting.",
    ),
    _row(
        Sign.FORCED_EXIT,
        "Schedulers still alive",
        "Schedulers still alive 15s after ShutdownReq, killing them before they released: [7]",
    ),
    _row(Sign.SEGFAULT, "Fatal Python error: Segmentation fault", "Fatal Python error: Segmentation fault"),
    # Memory.
    _row(
        Sign.CUDA_OOM,
        "CUDA out of memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of "
        "79.10 GiB of which 1.02 GiB is free. Process 77 has 78.08 GiB memory in use.",
        rf"CUDA out of memory(?:\. Tried to allocate (?P<tried>{_SIZE}))?"
        rf"(?:\.? \(?GPU (?P<gpu>\d{{1,4}})(?: has a total capacity of (?P<total>{_SIZE}) of which (?P<free>{_SIZE}) is free)?)?",
    ),
    _row(
        Sign.CUDA_OOM,
        "CUBLAS_STATUS_ALLOC_FAILED",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    _row(
        Sign.CUDA_OOM,
        "Capture cuda graph failed",
        "Exception: Capture cuda graph failed: CUDA out of memory.",
    ),
    _row(
        Sign.POOL_TOO_SMALL,
        "Please try to increase --mem-fraction-static",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: 0.6",
        r"(?:Current value: (?:self\.server_args\.mem_fraction_static=)?(?P<fraction>[\d.]{1,9}))?$",
    ),
    _row(
        Sign.KV_EXHAUSTED,
        "KV cache pool is full. Retract requests",
        "[…] KV cache pool is full. Retract requests. #retracted_reqs: 3, #new_token_ratio: 0.6 -> 0.9",
        r"Retract requests\.(?: #retracted_reqs?: (?P<retracted>\d{1,9}))?",
    ),
    _row(
        Sign.KV_EXHAUSTED, "Prefill out of memory", "[…] Prefill out of memory. Try to lower your batch size."
    ),
    _row(
        Sign.KV_EXHAUSTED, "Decode out of memory", "[…] Decode out of memory. Try to lower your batch size."
    ),
    _row(
        Sign.RAY_MEMORY_KILL,
        "running low on memory",
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory. Memory on the node "
        "(IP: 10.0.0.5, ID: 0a1b) where the task (actor ID: 9f, name=RolloutWorker.generate, pid=123, memory used=21.50GB) "
        "was running was 241.00GB / 251.00GB (0.960159), which exceeds the memory usage threshold of 0.95.",
        r"running low on memory(?:.{0,400}?pid=(?P<pid>\d{1,9}), memory used=(?P<used>[\d.]{1,12} ?[KMGT]?i?B))?"
        r"(?:.{0,200}? was (?P<node_used>[\d.]{1,12} ?[KMGT]?i?B) / (?P<node_total>[\d.]{1,12} ?[KMGT]?i?B))?",
    ),
    _row(
        Sign.RAY_MEMORY_KILL,
        "killed due to memory pressure (OOM)",
        "(raylet) 3 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to other reasons "
        "at node (ID: 0a1b, IP: 10.0.0.5) over the last time period.",
        r"(?P<workers>\d{1,9}) Workers \(tasks / actors\) killed due to memory pressure",
    ),
    _row(
        Sign.HOST_OOM_KILL,
        "ut of memory: Killed process",
        "Memory cgroup out of memory: Killed process 4242 (python) total-vm:9kB, anon-rss:8kB, file-rss:0kB",
        r"Killed process (?P<pid>\d{1,9}) \((?P<name>.{1,64}?)\)",
    ),
    # The device and the network between devices.
    _row(
        Sign.XID,
        "NVRM: Xid",
        "NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, name=python, GPU has fallen off the bus.",
        r"NVRM: Xid \((?:PCI:)?(?P<bus>[0-9a-fA-F:.]{1,20})\): (?P<xid>\d{1,6})(?:, pid=(?P<pid>\d{1,9}))?",
    ),
    _row(
        Sign.CUDA_ERROR,
        "CUDA error: ",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        r"CUDA error: (?P<what>(?!out of memory|CUBLAS_STATUS_ALLOC_FAILED)[\w ,-]{3,100})",
    ),
    _row(
        Sign.NCCL_TIMEOUT,
        "Watchdog caught collective operation timeout",
        "[rank3]:[E1120 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600029 milliseconds",
        r"(?:\[Rank (?P<rank>\d{1,9})\] )?Watchdog caught collective operation timeout"
        r"(?:.{0,60}OpType=(?P<operation>\w{1,30}).{0,80}Timeout\(ms\)=(?P<timeout_ms>\d{1,12}))?",
    ),
    _row(
        Sign.NCCL_TIMEOUT,
        "Timed out waiting",
        "RuntimeError: [gloo/transport/tcp/x.cc] Timed out waiting 1800000ms for recv operation to complete",
        r"waiting (?P<timeout_ms>\d{1,12})ms for (?:recv|send) operation",
    ),
    _row(
        Sign.NCCL_ERROR,
        "ncclSystemError",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, ncclSystemError: System call failed",
    ),
    _row(
        Sign.NCCL_ERROR,
        "ncclRemoteError",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
    ),
    _row(
        Sign.CONNECTION_REFUSED,
        "onnection refused",
        "requests.exceptions.ConnectionError: HTTPConnectionPool(host='127.0.0.1', port=30000): [Errno 111] Connection refused",
        r"(?:port=(?P<port>\d{1,5}).{0,200})?[Cc]onnection refused",
    ),
    _row(
        Sign.CONNECTION_REFUSED,
        "All connection attempts failed",
        "httpx.ConnectError: All connection attempts failed",
    ),
    _row(
        Sign.CONNECTION_REFUSED,
        "Cannot connect to host",
        "aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 127.0.0.1:30000 ssl:default",
        r"connect to host (?P<host>[\w.:-]{1,80}):(?P<port>\d{1,5})",
    ),
    _row(
        Sign.CONNECTION_RESET,
        "onnection reset by peer",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
    ),
    _row(
        Sign.CONNECTION_RESET,
        "Server disconnected",
        "aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected",
    ),
    _row(
        Sign.CONNECTION_RESET,
        "Remote end closed connection",
        "http.client.RemoteDisconnected: Remote end closed connection without response",
    ),
    # Ray.
    _row(
        Sign.RAY_ACTOR_DIED,
        "The actor died unexpectedly before finishing this task",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
    ),
    _row(
        Sign.RAY_ACTOR_DIED,
        "The actor is dead because",
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
    ),
    _row(
        Sign.RAY_ACTOR_DIED,
        "ActorUnavailableError",
        "ray.exceptions.ActorUnavailableError: The actor 9f is unavailable: The actor is temporarily unavailable",
    ),
    _row(
        Sign.RAY_ACTOR_DIED,
        "worker died or was killed while executing a task",
        "(raylet) A worker died or was killed while executing a task by an unexpected system error. Worker ID: 0a Worker PID: 4242 exit type: SYSTEM_ERROR",
        r"executing a task(?:.{0,400}?[Ww]orker PID: (?P<pid>\d{1,9}))?",
    ),
    _row(
        Sign.RAY_NODE_DIED,
        "has been marked dead because the detector",
        "The node with node id: 0a1b and address: 10.0.0.5 has been marked dead because the detector has missed too many heartbeats",
        r"address: (?P<address>[\w.:-]{1,60})",
    ),
    # The trainer's own.
    _row(Sign.CANCELLED, "CancelledError", "asyncio.exceptions.CancelledError"),
    _row(
        Sign.DISK_FULL,
        "No space left on device",
        "OSError: [Errno 28] No space left on device: '/ckpt/step_188/model.safetensors'",
        r"No space left on device(?:: '(?P<path>[^']{1,300})')?",
    ),
    _row(Sign.DISK_FULL, "Disk quota exceeded", "OSError: [Errno 122] Disk quota exceeded"),
)
