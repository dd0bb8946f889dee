"""Holds memory on the first GPU until it is ended: `python gpu_holder.py MIB`, by CUDA's own library."""

import ctypes
import sys
import threading


def main(mib: str) -> None:
    cuda = ctypes.CDLL("libcuda.so.1")
    context, pointer = ctypes.c_void_p(), ctypes.c_uint64()
    size = ctypes.c_size_t(int(mib) << 20)
    for code in (
        cuda.cuInit(0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
        cuda.cuCtxSetCurrent(context),
        cuda.cuMemAlloc_v2(ctypes.byref(pointer), size),
        cuda.cuMemsetD8_v2(pointer, 1, size),
        cuda.cuCtxSynchronize(),
    ):
        if code:
            sys.exit(f"CUDA error {code}")
    print("holds", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
