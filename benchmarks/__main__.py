"""`python -m benchmarks [cpu | demo | tables]`; without a name, `cpu`."""

import sys

from benchmarks import cpu, demo, tables

COMMANDS = {"cpu": cpu.main, "demo": demo.main, "tables": tables.main}


def main() -> None:
    name, *rest = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in COMMANDS else ["cpu", *sys.argv[1:]]
    COMMANDS[name](rest)


if __name__ == "__main__":
    main()
