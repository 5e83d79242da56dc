"""A made-up result in which everything occurs, to test the renderings with and to look at when one is changed.

`python -m trysquare_conformance.report.sample FILE` writes the page of such a result.
"""

import math
import random
import sys
from pathlib import Path
from typing import Any

from trysquare_conformance.report import html
from trysquare_conformance.report.schema import Result, plain, validate

DTYPES = {
    "float32": ("fp32", 2.0**-24),
    "bfloat16": ("bf16", 2.0**-8),
    "float16": ("fp16", 2.0**-11),
    "float64": ("fp64", 2.0**-53),
}
SHAPES = ("96x40", "40x96", "1x257", "257x1", "127x31", "8x4x3x3", "12x10+7", "31", "0x3")
SETTINGS = ("vector/gradient", "vector/update", "matrix/gradient", "none/gradient")
ERRORS = {
    "error": "RuntimeError: expected scalar type Float\nbut found BFloat16",
    "could not tell": "the draws leave the range of the format in every entry",
    "expected failure": "bf16 dot on a masked load is wrong in Triton 3.9's interpreter",
}
HOSTILE = (
    "</title></style></script><script>alert(1)</script><img src=//x.test> ' \" &amp; ]]> {{ 7*7 }} | `a` ``b`` "
    "[l](http://x.test) **b** \x1b[31mred\x1b[0m\x00\x85 \u202egnp.exe @everyone \ud800\r\n# head\n| --- |"
)


def lane(name: str, reason: str | None = None) -> dict[str, Any]:
    """A lane that ran, or that did not for this reason."""
    backend, device = name.split("-")
    return {
        "name": name,
        "device": device,
        "backend": backend,
        "status": "not run here" if reason else "ran",
        "reason": reason,
        "witness": None if reason else f"{backend} calls counted: update_ 1,204",
        "seconds": 0.0 if reason else 21.7,
        "cases": 0 if reason else 1,
    }


def row(
    case: str, lane: str, dtype: str = "float32", status: str = "right", margin: float | None = 0.4
) -> dict[str, Any]:
    """A row with the output of a case of this status and margin; without a margin nothing was compared."""
    u = DTYPES[dtype][1]
    spread, floor = 3.7 * u, u / 2
    compared = margin is not None
    return {
        "case": case,
        "algorithm": case.partition("/")[0],
        "lane": lane,
        "dtype": dtype,
        "status": status,
        "margin": margin,
        "norm_margin": None if margin is None else 0.6 * margin,
        "element_margin": margin,
        "drift_margin": 0.2 if compared else None,
        "yardstick": 1.07 if compared and lane != "eager-cpu" else None,
        "stage": "step 2" if compared else None,
        "output": "update/0" if compared else None,
        "worst": {"index": [3, 17], "fast": 0.12512341, "reference": 0.125, "baseline": None} if compared else None,
        "budget": {
            "draws": 32,
            "unit_roundoff": u,
            "spread": spread,
            "multiple": 6.2,
            "floor": floor,
            "allowed": 6.2 * spread + floor,
        }
        if compared
        else None,
        "error": ERRORS.get(status),
        "seconds": 0.03,
        "reproduce": f"trysquare verify --lane {lane} --case '{case}'",
    }


def machine() -> dict[str, Any]:
    """A small machine without a GPU."""
    return {
        "python": "3.12.4",
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "torch": "2.13.0+cpu",
        "numpy": "2.3.4",
        "triton": None,
        "gpu": None,
        "driver": None,
        "flags": {"allow_tf32": False, "float32_matmul_precision": "highest", "TRITON_DEFAULT_FP_FUSION": "1"},
        "trysquare": "0.1.0",
        "dolphinflow_module": "the alias of trysquare",
    }


def result(rows: list[dict[str, Any]] | None = None, verdict: str = "right") -> dict[str, Any]:
    """A result with these rows, or with one that is right."""
    rows = [row("dolphinflow/vector/fp32/96x40", "eager-cpu")] if rows is None else rows
    return {
        "schema": 1,
        "verdict": verdict,
        "sentence": f"{verdict.capitalize()}: {len(rows)} cases on eager-cpu and compiled-cpu.",
        "tier": "standard",
        "started": "2025-11-22T10:12:41+00:00",
        "seconds": 203.4,
        "command": "trysquare verify --tier standard",
        "machine": machine(),
        "lanes": [
            lane("eager-cpu"),
            lane("compiled-cpu"),
            lane("eager-cuda", "torch sees no CUDA or ROCm device"),
            lane("compiled-cuda", "torch sees no CUDA or ROCm device"),
        ],
        "results": rows,
        "faults": {
            "caught": 41,
            "planted": 44,
            "indistinguishable": [
                {"name": "ns-coefficient-c", "lane": "compiled-cpu", "reason": "0.6 budgets in bf16"}
            ],
            "missed": ["stale-scale"],
        },
        "kernels": [kernel("sm_90"), kernel("sm_90", "spills"), kernel("gfx942"), kernel("gfx942", "error")],
    }


def kernel(target: str, status: str = "fits") -> dict[str, Any]:
    """A kernel compiled ahead of time, or that could not be."""
    failed = status == "error"
    sizes = {"registers": 96, "shared": 4096, "local": 64 if status == "spills" else 0, "stack": 0, "spills": 0}
    return {
        "algorithm": "dolphinflow",
        "configuration": "vector/gradient/fp32",
        "kernel": "update_rows",
        "constants": "PARAMETER=fp32, ROWS=1",
        "target": target,
        "status": status,
        **{name: None if failed else size for name, size in sizes.items()},
        "error": "CompilationError: no such instruction" if failed else None,
    }


def many(amount: int, bad: float = 0.05) -> dict[str, Any]:
    """A wrong result with rows of every status, margins spread as real ones are."""
    draw = random.Random(7)  # noqa: S311 - a picture, not a secret
    rows = []
    for index in range(amount):
        dtype = list(DTYPES)[index % 4]
        algorithm = "stablemax/cross_entropy" if index % 5 == 0 else f"dolphinflow/{draw.choice(SETTINGS)}"
        settings = (
            f"adaptive/clip=1/decay=0.01/{DTYPES[dtype][0]}/{draw.choice(SHAPES)}/contiguous/gaussian/steps={index}"
        )
        status = "right"
        margin: float | None = min(0.97, draw.lognormvariate(-1.1, 0.45) * (1e-3 if dtype == "float64" else 1))
        if "/0x3/" in settings:
            margin = 0.0
        if draw.random() < bad:
            outcomes = [("wrong", 1 + draw.lognormvariate(1, 2)), ("wrong", math.inf), ("wrong", None), ("error", None)]
            outcomes += [("could not tell", 0.0), ("expected failure", 8.1e9)]
            status, margin = draw.choice(outcomes)
        rows.append(
            row(f"{algorithm}/{settings}", ("eager-cpu", "compiled-cpu")[index // 4 % 2], dtype, status, margin)
        )
    return result(rows, "wrong")


def hostile(value: Any) -> Any:
    """The same result with hostile text wherever the schema takes any text."""
    fixed = {"right", "wrong", "error", "could not tell", "expected failure", "ran", "not run here", "fits", "spills"}
    if isinstance(value, dict):
        return {key: hostile(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return value + HOSTILE if isinstance(value, str) and value not in fixed else value


def checked(value: dict[str, Any]) -> Result:
    """The result as the renderings take it."""
    return validate(plain(value))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(html.render(checked(many(300))), encoding="utf-8")
