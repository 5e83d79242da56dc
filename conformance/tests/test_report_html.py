"""The HTML report shows everything, loads nothing, and is safe against hostile text; so is the Markdown."""

import base64
import hashlib
import math
import re
import time
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from trysquare_conformance.report import html, markdown, schema, strip, summary, text
from trysquare_conformance.report.sample import ERRORS, HOSTILE, checked, hostile, many, result, row


def bad_rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in value["results"] if row["status"] in summary.BAD]


class Page(HTMLParser):
    """A parsed page: its elements, their attributes and texts; it must be well formed."""

    VOID = frozenset({"meta", "link", "wbr", "input", "br", "img"})
    OPTIONAL = frozenset({"tr", "td", "th", "tbody", "thead", "option"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)
        if tag in {"code", "script", "style", "h1", "td", "h3", "p"}:
            self.texts.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag
        if tag != "i":
            self.texts.append(("", ""))

    def handle_data(self, data: str) -> None:
        if self.texts:
            tag, before = self.texts[-1]
            self.texts[-1] = (tag, before + data)

    def all(self, tag: str) -> list[str]:
        return [found.strip() for name, found in self.texts if name == tag]

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def wrong() -> dict[str, Any]:
    return many(400, bad=0.1)


@pytest.fixture(scope="module")
def disaster() -> schema.Result:
    """An exhaustive run in which nothing is right."""
    return checked(many(20_000, bad=1))


@pytest.fixture(scope="module")
def page(wrong: dict[str, Any]) -> Page:
    return Page(html.render(checked(wrong)))


def test_every_failure_has_its_reproduce_line_in_html(wrong: dict[str, Any], page: Page) -> None:
    assert {row["reproduce"] for row in bad_rows(wrong)} <= set(page.all("code"))


def test_failures_beyond_the_cards_have_a_line_each() -> None:
    rows = [row(f"dolphinflow/{index}", "eager-cpu", "float32", "wrong", 2.0) for index in range(html.CARDS + 40)]
    found = Page(html.render(checked(result(rows, "wrong"))))
    assert sum(tag == "article" for tag, _ in found.tags) == html.CARDS
    assert {row["reproduce"] for row in rows} <= set(found.all("code"))


def test_every_budget_stands_in_the_table_as_a_number(wrong: dict[str, Any], page: Page) -> None:
    cells = page.all("td")
    for entry in wrong["results"]:
        numbers = cells[cells.index(entry["case"]) :][:12]
        if entry["budget"]:
            budget = entry["budget"]
            expected = [text.figure(budget[key]) for key in ("spread", "multiple", "floor", "allowed")]
            assert numbers[3:9] == ["32", text.roundoff(budget["unit_roundoff"]), *expected]
        assert text.figure(entry["margin"]) in numbers[9]


def test_the_page_says_the_verdict_the_machine_what_was_not_run_and_the_faults(wrong: dict[str, Any]) -> None:
    words = re.sub(r"<[^>]*>", "", html.render(checked(wrong)).split("</style>")[1])
    assert wrong["sentence"] in words
    for said in (
        "2.13.0+cpu",
        "AMD EPYC 9R14",
        "not installed",
        "allow_tf32=False",
        "torch sees no CUDA or ROCm device",
    ):
        assert said in words
    for said in (
        "41 of 44 planted faults caught",
        "stale-scale",
        "0.6 budgets in bf16",
        "2 spill or do not compile",
        "96 · 4K",
        "spills (96 registers, 64 local, 0 stack, 0 spills)",
        ERRORS["expected failure"][:30],
    ):
        assert said in words


def test_a_card_shows_the_arithmetic_of_its_budget() -> None:
    source = html.render(checked(result([row("a/b", "compiled-cpu", "float32", "wrong", 16.8)], "wrong")))
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", source[source.index('id="f1"') : source.index("</article>")]))
    for said in ("step 2", "update/0[3, 17]", "0.12512341", "0.125", "32 draws at u = 2⁻²⁴", "1.07 of eager"):
        assert said in words
    assert re.search(r"2.21 × 10⁻⁷ spread × 6.20 multiple \+ 2.98 × 10⁻⁸ floor = 1.40 × 10⁻⁶ allowed", words)
    assert re.search(r"2.35 × 10⁻⁵ observed ÷ 1.40 × 10⁻⁶ allowed = 16.8 margin", words)


def test_nothing_is_loaded_from_elsewhere(wrong: dict[str, Any], page: Page) -> None:
    source = html.render(checked(wrong))
    assert all(target.startswith(("#", "data:")) for target in page.attributes("href"))
    assert page.attributes("src") == page.attributes("style") == []
    assert not re.search(r"url\(|@import|https?:|//[a-z]", source.split("<body>")[0].split("<style>")[1])
    assert not re.search(r"fetch|XMLHttp|import\(|innerHTML|eval", page.all("script")[0])


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(wrong: dict[str, Any]) -> None:
    source = html.render(checked(wrong))
    found = Page(source)
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    allowed = dict(part.split(maxsplit=1) for part in policy.split("; "))
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        assert (
            allowed[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
        )
    assert allowed["default-src"] == "'none'"
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = page.attributes("id")
    assert max(Counter(ids).values()) == 1
    assert {target[1:] for target in page.attributes("href") if target.startswith("#")} <= set(ids)


def test_the_page_is_whole_without_a_script(page: Page) -> None:
    """What needs the script is hidden until it runs, and nothing else is."""
    assert [tag for tag, attributes in page.tags if "hidden" in attributes] == ["form"]


def test_light_and_dark_and_print_are_designed(wrong: dict[str, Any]) -> None:
    style = html.render(checked(wrong)).split("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_colour_is_never_alone() -> None:
    """Each coloured cell of the matrix also carries its mark and its number or word."""
    rows = [
        row("a/1", "eager-cpu", status="wrong", margin=3.0),
        row("a/2", "compiled-cpu", status="error", margin=None),
    ]
    source = html.render(checked(result(rows, "wrong")))
    cells = re.findall(r'<td class="bad"[^>]*><b>([^<]*)</b><small>([^<]*)', source)
    assert cells == [("✗ 3.00", "1 of 1 case"), ("! error", "1 of 1 case")]


def test_a_large_report_stays_usable() -> None:
    rows = many(20_000)
    started = time.process_time()
    source = html.render(checked(rows))
    assert time.process_time() - started < 10
    assert len(source.encode()) < 10_000_000


def test_a_large_report_of_failures_alone_stays_usable(disaster: schema.Result) -> None:
    assert len(html.render(disaster).encode()) < 10_000_000


def drawn(plot: strip.Plot, status: str) -> list[float]:
    """The x of every mark of a status."""
    named = [dot.path for band in plot.strips for dot in band.named if dot.status == status]
    paths_ = [band.paths[status] for band in plot.strips if status in band.paths]
    return [float(x) for path in named + paths_ for x in re.findall(r"M([\d.]+)", path)]


def test_no_dot_is_drawn_on_the_wrong_side_of_the_line_at_1() -> None:
    margins = [1e-4, 0.2, 0.99, 1.0, 1.0001, 1.3, 50.0]
    rows = [row(f"a/{m}", "eager-cpu", status="right" if m <= 1 else "wrong", margin=m) for m in margins]
    plot = strip.plot(checked(result(rows)), {})
    assert plot is not None
    line = plot.axis.at(1)
    assert len(drawn(plot, "right")) == 4
    assert max(drawn(plot, "right")) < line < min(drawn(plot, "wrong"))
    assert 0.45 < (line - max(drawn(plot, "right"))) / strip.DOT < 0.55


def test_what_has_no_finite_margin_stands_off_the_scale() -> None:
    rows = [row("a/1", "eager-cpu"), row("a/2", "eager-cpu", status="wrong", margin=math.inf)]
    rows += [
        row("a/3", "eager-cpu", status="wrong", margin=math.nan),
        row("a/4", "eager-cpu", status="error", margin=None),
    ]
    rows += [row("a/5", "eager-cpu", margin=0.0), row("a/6", "eager-cpu", status="wrong", margin=1e30)]
    plot = strip.plot(checked(result(rows)), {})
    assert plot is not None
    assert min(drawn(plot, "wrong") + drawn(plot, "error")) > plot.axis.end
    assert min(drawn(plot, "right")) < plot.axis.start
    assert (plot.axis.low, plot.axis.high) == (-1, 1)


def test_every_case_is_drawn_and_failures_lead_to_their_cards(wrong: dict[str, Any], page: Page) -> None:
    plot = strip.plot(checked(wrong), {})
    assert plot is not None
    assert plot.share == 1
    for status in ("wrong", "error", "right", "expected failure"):
        amount = sum(row["status"] == status and (row["margin"] != 0 or status != "right") for row in wrong["results"])
        assert len([x for x in drawn(plot, status) if status != "right" or x > plot.axis.start - strip.DOT]) == amount
    assert {f"#f{rank + 1}" for rank in range(len(bad_rows(wrong)))} <= set(page.attributes("href"))


def test_many_cases_share_a_dot_and_the_page_says_so() -> None:
    rows = [row(f"a/{index}", "eager-cpu", margin=0.5) for index in range(1000)]
    plot = strip.plot(checked(result(rows)), {})
    assert plot is not None
    assert plot.share * len(drawn(plot, "right")) >= 1000
    assert f"up to {plot.share} right ones" in html.render(checked(result(rows)))


def test_there_is_no_plot_without_margins() -> None:
    assert strip.plot(checked(result([])), {}) is None


def test_hostile_text_stays_text_in_html() -> None:
    source = html.render(checked(hostile(many(40, bad=0.5))))
    found = Page(source)
    assert Counter(tag for tag, _ in found.tags)["script"] == 1
    assert "img" not in {tag for tag, _ in found.tags}
    assert all(target.startswith(("#", "data:")) for target in found.attributes("href"))
    assert found.all("h1")[0].endswith(text.clean(HOSTILE))
    assert "49" not in found.all("h1")[0]
    assert not set(source) & set("\x1b\x00\x85\u202e\ud800")


# Markdown


def rendered(source: str) -> Page:
    """Markdown as GitHub reads it: with tables and with HTML."""
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(source))


def test_every_failure_has_its_reproduce_line_in_markdown(wrong: dict[str, Any]) -> None:
    found = rendered(markdown.render(checked(wrong)))
    assert {row["reproduce"] for row in bad_rows(wrong)} <= set(found.all("code"))


def test_the_summary_of_a_job_is_not_cut_off(disaster: schema.Result) -> None:
    source = markdown.render(disaster)
    assert len(source.encode()) < 2**20
    assert re.search(r"[\d,]+ more failures in the JSON and HTML reports", source)
    assert "Worst margins" in source


def test_markdown_shows_matrix_machine_reasons_and_faults(wrong: dict[str, Any]) -> None:
    source = markdown.render(checked(wrong))
    assert source.startswith(f"## ❌ trysquare: wrong\n\n{wrong['sentence']}\n")
    assert "| Algorithm | Dtype | eager-cpu | compiled-cpu | eager-cuda | compiled-cuda |" in source
    assert "| eager-cuda | torch sees no CUDA or ROCm device |" in source
    for said in ("2.13.0+cpu", "41 of 44 planted faults caught", "`stale-scale`", "What the budgets resolve to"):
        assert said in source
    for said in ("2 spill or do not compile", "96 · 4K", "no such instruction"):
        assert said in source


def test_hostile_text_stays_text_in_markdown() -> None:
    source = markdown.render(checked(hostile(many(40, bad=0.5))))
    found = rendered(source)
    assert not {"script", "img", "a"} & {tag for tag, _ in found.tags}
    assert Counter(tag for tag, _ in found.tags)["h1"] == 0
    assert not set(source) & set("\x1b\x00\x85\u202e\ud800")
