"""The console script: it opens the daemon's command line, or says in one line what to install for it."""

import sys


def main() -> None:
    """Run `stepguard`; without the extra `daemon`, name the extra and exit 2."""
    try:
        from stepguardd.cli import main as run_cli  # noqa: PLC0415 - the trainer's package must import without it
    except ModuleNotFoundError as missing:
        print(
            f"stepguard: the daemon's part is not installed (no {missing.name}); "
            "install it with: pip install 'stepguard[daemon]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    run_cli()
