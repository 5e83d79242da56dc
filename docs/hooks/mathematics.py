"""LaTeX in a page becomes MathML while the site is built, so that reading it needs neither a network nor a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

MARKED = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<latex>.*?)\\[\])]</(?P=tag)>', re.DOTALL)
# A named function among its neighbours; not where a fraction or an index counts its children.
NAMED = r"(?<!<msub>)(?<!<msup>)(?<!<mfrac>)(?<!<munder>)(?<!<mover>)<mi>[a-z0-9]{2,}</mi>"
# What the converter leaves to the browser, which spaces a named function as a variable and a bar as an operator.
SPACING = (
    (re.compile(r"<mo>([a-z0-9]{2,})</mo>"), r"<mi>\1</mi>"),
    (re.compile(rf"({NAMED})(?!<mo|</)"), r'\1<mspace width="0.167em" />'),
    (re.compile(rf"(?<!</mo>)(?<!<mrow>)(?={NAMED})"), '<mspace width="0.167em" />'),
    (re.compile(r"<mo[^>]*>&#x(0007C|02016);</mo>"), r'<mo stretchy="false" lspace="0" rspace="0">&#x\1;</mo>'),
    (re.compile(r"<mo>&#x0221E;</mo>"), "<mi>&#x0221E;</mi>"),
)


def on_page_content(markup: str, **_: object) -> str:
    """MkDocs calls this with the HTML of every page, docstrings included."""
    return MARKED.sub(lambda found: to_mathml(found["latex"], block=found["tag"] == "div"), markup)


def to_mathml(latex: str, *, block: bool) -> str:
    """One formula. What the converter does not know would stand in the page as LaTeX, so it stops the build."""
    text = html.unescape(latex).strip().replace("{aligned}", "{split}")  # the converter's name for it
    mathml = str(convert(text, display="block" if block else "inline"))
    unknown = re.findall(r"<m[io]>(\\[A-Za-z]+|&)</m[io]>", mathml)
    if unknown:
        raise PluginError(f"no MathML for {', '.join(unknown)} in the formula {text!r}")
    for pattern, replacement in SPACING:
        mathml = pattern.sub(replacement, mathml)
    return mathml
