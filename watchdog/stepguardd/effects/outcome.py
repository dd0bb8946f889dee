"""How an effect ended."""

from dataclasses import dataclass

from ..core.events import GpuBaseline, Proc, WeightsLook


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Done, or not and why in words for a person."""

    ok: bool
    detail: str = ""
    procs: tuple[Proc, ...] = ()
    target_step: int | None = None
    target_path: str | None = None
    needless: bool = False
    kept_arguments: str | None = None
    """Why a server was started with its old arguments, though others were asked for."""
    looks: tuple[WeightsLook, ...] = ()
    gpu_baseline: tuple[GpuBaseline, ...] = ()
    memory_held: str | None = None


def failed(detail: str) -> Outcome:
    """It could not be done."""
    return Outcome(ok=False, detail=detail[:2000])
