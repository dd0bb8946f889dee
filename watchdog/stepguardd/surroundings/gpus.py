"""What is wrong with the GPUs, as events: Xids, uncorrected errors, memory that fills up or is left held."""

from collections.abc import Iterable
from typing import Final

from ..core.events import GpuTrouble, GpuTroubled
from ..sources.gpu import Headroom, strangers
from ..sources.nvml import Gpu, Xid
from .host import THIS_HOST
from .owners import Owners

FILLING_AGAIN_S: Final = 1800.0


class GpuTroubles:
    """What is wrong with the GPUs, told when it begins. A first look is where counting starts."""

    def __init__(self, owners: Owners, growth_s: float = THIS_HOST.growth_s) -> None:
        self._owners = owners
        self._window_s = 2 * growth_s
        self._lost: frozenset[int] = frozenset()
        self._indices: dict[str, int] = {}
        self._ecc: dict[int, int] = {}
        self._headroom: dict[int, Headroom] = {}
        self._filling_told: dict[int, float] = {}
        self._orphans: frozenset[tuple[int, int]] = frozenset()
        self._last: tuple[Gpu, ...] | None = None

    def look(self, now: float, gpus: tuple[Gpu, ...] | None, xids: Iterable[Xid]) -> list[GpuTroubled]:
        """Take in one reading; one that was handed out before tells nothing new."""
        # A GPU that has just fallen off the bus says its name no more, and its Xid is told in the same look.
        self._indices |= {gpu.uuid: gpu.index for gpu in gpus or () if gpu.uuid is not None}
        found = [self._xid(xid) for xid in xids]
        if gpus is None or gpus is self._last:
            return found
        self._last = gpus
        lost = frozenset(gpu.index for gpu in gpus if gpu.lost)
        found += [
            GpuTroubled(
                trouble=GpuTrouble.LOST, gpu=index, text=f"GPU {index} is lost: it has fallen off the bus"
            )
            for index in sorted(lost - self._lost)
        ]
        self._lost = lost
        for gpu in gpus:
            found += self._errors(gpu)
            found += self._filling(now, gpu)
        return found + self._held(now, gpus)

    def _xid(self, xid: Xid) -> GpuTroubled:
        index = None if xid.uuid is None else self._indices.get(xid.uuid)
        whose = "a GPU" if index is None else f"GPU {index}"
        return GpuTroubled(
            trouble=GpuTrouble.XID, gpu=index, number=xid.number, text=f"{whose} reported Xid {xid.number}"
        )

    def _errors(self, gpu: Gpu) -> list[GpuTroubled]:
        errors = gpu.ecc_uncorrected
        if errors is None:
            return []
        before, self._ecc[gpu.index] = self._ecc.get(gpu.index, errors), errors
        new = errors - before
        if new <= 0:
            return []
        text = f"GPU {gpu.index}: {new} new uncorrected memory errors (ECC)"
        return [GpuTroubled(trouble=GpuTrouble.ECC, gpu=gpu.index, number=new, text=text)]

    def _filling(self, now: float, gpu: Gpu) -> list[GpuTroubled]:
        warning = self._headroom.setdefault(gpu.index, Headroom(window_s=self._window_s)).observe(now, gpu)
        told = self._filling_told.get(gpu.index)
        if warning is None or (told is not None and now - told < FILLING_AGAIN_S):
            return []
        self._filling_told[gpu.index] = now
        return [GpuTroubled(trouble=GpuTrouble.FILLING, gpu=gpu.index, text=warning)]

    def _held(self, now: float, gpus: tuple[Gpu, ...]) -> list[GpuTroubled]:
        """Memory that a leftover of the run holds; other people's jobs are none of its business."""
        held = frozenset(
            (index, process.pid)
            for index, process in strangers(gpus, self._owners.current)
            if self._owners.orphan(process.pid, now)
        )
        new, self._orphans = held - self._orphans, held
        return [
            GpuTroubled(
                trouble=GpuTrouble.ORPHAN,
                gpu=index,
                number=pid,
                text=f"GPU {index}: pid {pid}, a leftover of this run, still holds memory",
            )
            for index, pid in sorted(new)
        ]
