"""`python -m benchmarks demo`: trains the demo, and renews the picture and the numbers that README and docs show."""

from collections.abc import Sequence

from benchmarks import results
from trysquare_conformance.demo import run_demo

PICTURE = results.ROOT / "docs" / "assets" / "demo.png"


def main(_: Sequence[str]) -> None:
    run_demo(picture=PICTURE, json=results.path("demo"))
