"""LaTeX in a page becomes MathML while the site is built, so that reading it needs neither a network nor a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

MARKED = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<latex>.*?)\\[\])]</(?P=tag)>', re.DOTALL)


def on_page_content(markup: str, **_: object) -> str:
    """MkDocs calls this with the HTML of every page, docstrings included."""
    return MARKED.sub(lambda found: to_mathml(found["latex"], block=found["tag"] == "div"), markup)


def to_mathml(latex: str, *, block: bool) -> str:
    """One formula. What the converter does not know would stand in the page as LaTeX, so it stops the build."""
    text = html.unescape(latex).strip()
    mathml = str(convert(text, display="block" if block else "inline"))
    unknown = re.findall(r"<m[io]>(\\[A-Za-z]+)</m[io]>", mathml)
    if unknown:
        raise PluginError(f"no MathML for {', '.join(unknown)} in the formula {text!r}")
    return mathml
