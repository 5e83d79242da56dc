"""The JUnit rendering, for continuous integration: one testsuite a lane, one testcase a case."""

from collections.abc import Iterable
from datetime import datetime
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element, SubElement

from trysquare_conformance.report import kernels, summary
from trysquare_conformance.report.schema import Kernel, Lane, Result, Row
from trysquare_conformance.report.text import clean, clean_lines, figure, number

# What could not be told is an error in JUnit's sense: the test ended without an answer, and the suite is not green.
_OUTCOME = {"wrong": "failure", "error": "error", "could not tell": "error", "expected failure": "skipped"}


def render(result: Result) -> str:
    """The report as text, the same for the same result."""
    suites = Element("testsuites")  # without attributes: one of the schemas in use knows none
    for identity, lane in enumerate(_lanes(result)):
        suites.append(_suite(lane, [row for row in result["results"] if row["lane"] == lane["name"]], identity, result))
    compiled = result.get("kernels")
    if compiled:
        suites.append(_compilations(compiled, len(suites), result))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _lanes(result: Result) -> list[Lane]:
    """The declared lanes, and one for every row that names another."""
    declared = {lane["name"]: lane for lane in result["lanes"]}
    for row in result["results"]:
        if row["lane"] not in declared:
            declared[row["lane"]] = Lane(
                name=row["lane"], device="", backend="", status="ran", reason=None, witness=None, seconds=0.0, cases=0
            )
    return list(declared.values())


def _suite(lane: Lane, rows: list[Row], identity: int, result: Result) -> Element:
    suite = Element("testsuite", name=clean(lane["name"]), package="trysquare", id=str(identity), hostname="localhost")
    suite.set("timestamp", _timestamp(result["started"]))
    suite.set("time", _time(lane["seconds"]))
    properties = SubElement(suite, "properties")
    for label, value in summary.machine_facts(result["machine"]):
        SubElement(properties, "property", name=label, value=value)
    cases = [_case(row) for row in rows] if lane["status"] == "ran" or rows else [_not_run(lane)]
    suite.extend(cases)
    _total(suite)
    SubElement(suite, "system-out").text = clean(lane["witness"] or "")
    SubElement(suite, "system-err")
    return suite


def _compilations(compiled: list[Kernel], identity: int, result: Result) -> Element:
    """A suite of all kernels that were compiled ahead of time."""
    lane = Lane(name="kernels", device="", backend="", status="ran", reason=None, witness=None, seconds=0.0, cases=0)
    suite = _suite(lane, [], identity, result)
    for rank, kernel in enumerate(compiled):
        case = Element("testcase", classname=clean(f"kernels.{kernel['algorithm']}"), time="0.000")
        case.set("name", clean(f"{kernel['kernel']} {kernel['target']} {rank}"))
        if kernel["status"] != "fits":
            tag = "error" if kernel["status"] == "error" else "failure"
            SubElement(case, tag, type=kernel["status"], message=kernels.problem(kernel))
        suite.insert(1 + rank, case)
    _total(suite)
    return suite


def _total(suite: Element) -> None:
    """How many cases there are, and of each outcome."""
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(key, str(_count(cases, tag)))


def _count(cases: Iterable[Element], tag: str) -> int:
    return sum(case.find(tag) is not None for case in cases)


def _case(row: Row) -> Element:
    case = Element("testcase", classname=clean(f"{row['lane']}.{row['algorithm']}"), name=clean(row["case"]))
    case.set("time", _time(row["seconds"]))
    tag = _OUTCOME.get(row["status"])
    if tag:
        outcome = SubElement(case, tag, type=row["status"], message=_message(row))
        outcome.text = "\n".join(_details(row))
    return case


def _not_run(lane: Lane) -> Element:
    case = Element("testcase", classname=clean(lane["name"]), name="not run here", time="0.000")
    SubElement(case, "skipped", type="not run here", message=clean(lane["reason"] or "no reason given"))
    return case


def _message(row: Row) -> str:
    if row["error"]:
        return clean(next(iter(row["error"].splitlines()), ""))
    return clean(f"margin {figure(row['margin'])} in {row['output'] or 'no output'} at {row['stage'] or 'no stage'}")


def _details(row: Row) -> list[str]:
    entry, worst = summary.worst_place(row), row["worst"]
    lines = [clean_lines(row["error"])] if row["error"] else []
    lines += [clean(f"stage: {row['stage']}")] if row["stage"] else []
    if entry and worst:
        lines.append(f"{entry}: fast {worst['fast']}, reference {worst['reference']}, baseline {worst['baseline']}")
    lines += [f"budget: {summary.arithmetic(row)}"] if row["budget"] else []
    return [*lines, clean(f"reproduce: {row['reproduce']}")]


def _time(seconds: float | str) -> str:
    return f"{number(seconds) or 0.0:.3f}"


def _timestamp(started: str) -> str:
    """JUnit wants local time without a zone and without fractions."""
    try:
        return datetime.fromisoformat(started).replace(tzinfo=None, microsecond=0).isoformat()
    except ValueError:
        return "1970-01-01T00:00:00"
