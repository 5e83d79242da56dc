"""`python -m benchmarks [NAME]`: cpu, gpu, eightbit, thorn; demo, text, digits, training8bit; verified; tables."""

import sys

from benchmarks import cpu, demo, eightbit, tables, thorn, verified
from benchmarks.gpu import command as gpu

COMMANDS = {
    "cpu": cpu.main,
    "gpu": gpu.main,
    "eightbit": eightbit.main,
    "thorn": thorn.main,
    "demo": demo.main,
    "text": demo.text,
    "digits": demo.digits,
    "training8bit": demo.training8bit,
    "verified": verified.main,
    "tables": tables.main,
}


def main() -> None:
    name, *rest = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in COMMANDS else ["cpu", *sys.argv[1:]]
    COMMANDS[name](rest)


if __name__ == "__main__":
    main()
