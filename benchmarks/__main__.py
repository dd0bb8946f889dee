"""All benchmarks, one after the other: `make bench`."""

import importlib
import sys
from pathlib import Path


def main() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("__"))
    wanted = sys.argv[1:] or names
    for name in wanted:
        if name not in names:
            sys.exit(f"benchmarks: no {name!r}; there is {', '.join(names)}")
        print(f"\n== {name} ==", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
