"""`python -m trysquare_conformance …` and the command `trysquare`. Names the missing extra instead of a traceback."""

import importlib.util
import sys

NEEDED = ("torch", "numpy", "typer", "rich", "jinja2", "matplotlib")


def main() -> None:
    """Run the command line, if what it needs is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(  # noqa: T201  # before there is a console
            f'trysquare: {", ".join(missing)} not found; the commands need the extra "verify":\n\n'
            '    pip install "trysquare[verify]"\n',
            file=sys.stderr,
        )
        sys.exit(2)
    from trysquare_conformance.cli import app

    app(prog_name="trysquare")


if __name__ == "__main__":
    main()
