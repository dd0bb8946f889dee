"""
Makes a fresh SGLang environment importable on a machine without CUDA. Run by that environment's Python.

Two shims, neither of which computes anything: the package `sgl_kernel` beside this file, and two operator
declarations at the end of torchvision's `extension.py`, whose own are in a CUDA library that cannot be loaded
here. Both are idempotent. Then it looks that no CUDA library has come along, and that the server's modules
import.
"""

import importlib.metadata
import shutil
import sys
import sysconfig
from pathlib import Path

MARK = "# stepguard: operators declared where the compiled ones cannot be loaded"
DECLARATIONS = f"""

{MARK}
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Put in the shims, then look; the exit message names what is wrong."""
    packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copytree(Path(__file__).parent / "sgl_kernel", packages / "sgl_kernel", dirs_exist_ok=True)
    declare_operators(packages / "torchvision" / "extension.py")
    unwanted = cuda_packages()
    if unwanted:
        sys.exit(f"prepare: CUDA packages came along, about 5 GB: {', '.join(unwanted)}")


def declare_operators(extension: Path) -> None:
    """Append the declarations, once."""
    text = extension.read_text()
    if MARK not in text:
        extension.write_text(text + DECLARATIONS)


def cuda_packages() -> list[str]:
    """NVIDIA's wheels of libraries; `nvidia-ml-py` is a small binding and no library."""
    names = {str(found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
    return sorted(name for name in names if name.startswith("nvidia-") and name != "nvidia-ml-py")


if __name__ == "__main__":
    main()
