"""One word and one sentence for all that was run: right, wrong, could not tell, not run here."""

import math
from collections.abc import Sequence

from trysquare_conformance.report.schema import Faults, Kernel, Lane, Row, Verdict

EXIT_CODES: dict[Verdict, int] = {"right": 0, "wrong": 1, "could not tell": 3, "not run here": 4}
"""2 is what a command line answers to arguments that it does not understand."""

GOOD = ("right", "expected failure")


def verdict(
    lanes: Sequence[Lane],
    rows: Sequence[Row],
    demanded: Sequence[str] = (),
    faults: Faults | None = None,
    kernels: Sequence[Kernel] | None = None,
) -> tuple[Verdict, str]:
    """The verdict and its sentence.

    Never right are: a run of no case, a lane in `demanded` that did not run, cases that missed a planted fault,
    kernels that spill or do not compile, no kernel where some were to be compiled.
    """
    wrong = [row for row in rows if row["status"] == "wrong"]
    if wrong:
        return (
            "wrong",
            f"Wrong: {len(wrong)} of {_cases(rows)} exceed their budget or answer otherwise; {_worst(wrong)}.",
        )
    unknown = [row for row in rows if row["status"] not in GOOD]
    if unknown:
        first = unknown[0]
        why = f": {first['error']}" if first["error"] else ""
        return "could not tell", f"Could not tell: {len(unknown)} of {_cases(rows)}, first {_place(first)}{why}."
    if faults is not None and faults["missed"]:
        names = ", ".join(entry["name"] for entry in faults["missed"])
        return "could not tell", f"Could not tell: {_cases(rows)} are right, but they would miss a fault ({names})."
    spilling = [kernel for kernel in kernels or () if kernel["status"] != "fits"]
    if spilling or kernels == []:
        names = ", ".join(sorted({f"{kernel['kernel']} for {kernel['target']}" for kernel in spilling}))
        reason = f"some kernels spill or do not compile ({names})" if spilling else "no kernel was compiled"
        return "could not tell", f"Could not tell: {_cases(rows)} are right, but {reason}."
    absent = [lane for lane in lanes if lane["status"] != "ran" and lane["name"] in demanded]
    if absent or not rows:
        reasons = "; ".join(f"{lane['name']}: {lane['reason']}" for lane in absent or lanes) or "no case was selected"
        return "not run here", f"Not run here: {reasons}{_rest(rows)}."
    ran = [lane["name"] for lane in lanes if lane["status"] == "ran"]
    return "right", f"Right: {_cases(rows)} on {' and '.join(ran)}; {_worst(rows)}."


def _cases(rows: Sequence[Row]) -> str:
    return f"{len(rows)} case" + ("" if len(rows) == 1 else "s")


def _place(row: Row) -> str:
    return f"{row['case']} on {row['lane']}"


def _rest(rows: Sequence[Row]) -> str:
    return f" ({_cases(rows)} on other lanes are right)" if rows else ""


def _worst(rows: Sequence[Row]) -> str:
    """`the worst margin is 0.61 in … on …`; a wrong answer without a margin comes with its error."""
    worst = max(rows, key=lambda row: _size(row["margin"]))
    if worst["margin"] is None:
        return f"first {_place(worst)}" + (f": {worst['error']}" if worst["error"] else "")
    return f"the worst margin is {_size(worst['margin']):.3g} in {_place(worst)}"


def _size(margin: float | str | None) -> float:
    """NaN, which is no number of budgets, counts as infinitely many."""
    size = -1.0 if margin is None else float(margin)
    return math.inf if math.isnan(size) else size
