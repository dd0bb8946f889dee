"""
A process that does with a GPU what it is told on stdin, by the driver's own library alone.

`take BYTES` takes so much memory and keeps it, `fill` takes until nothing is left, `poke` lets a kernel write
where nothing is mapped. It answers each with the number of the CUDA driver API: 0 done, 2 out of memory, 700
illegal address.
"""

import ctypes
import sys

OUT_OF_MEMORY = 2
POKE = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry poke()
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    mov.u32 %r1, 1;
    mov.u64 %rd1, 4096;
    st.global.u32 [%rd1], %r1;
    ret;
}
\0"""


class Cuda:
    """The first GPU, and what was taken of it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._must("cuInit", 0)
        context = ctypes.c_void_p()
        self._must("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._must("cuCtxSetCurrent", context)

    def take(self, size_bytes: int) -> int:
        return self._call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(size_bytes))

    def fill(self) -> int:
        size_bytes, answer = 1 << 34, 0
        while answer == 0 or size_bytes > 1 << 21:
            if answer == OUT_OF_MEMORY:
                size_bytes //= 2
            answer = self.take(size_bytes)
        return answer

    def poke(self) -> int:
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self._must("cuModuleLoadData", ctypes.byref(module), POKE)
        self._must("cuModuleGetFunction", ctypes.byref(kernel), module, b"poke")
        self._must("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, None, None, None)
        return self._call("cuCtxSynchronize")

    def _must(self, name: str, *arguments: object) -> None:
        answer = self._call(name, *arguments)
        if answer != 0:
            raise SystemExit(f"{name}: {answer}")

    def _call(self, name: str, *arguments: object) -> int:
        return int(getattr(self._library, name)(*arguments))


def main() -> None:
    cuda = Cuda()
    print("ready", flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        print(getattr(cuda, word)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
