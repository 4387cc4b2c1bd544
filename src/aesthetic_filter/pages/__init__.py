"""Pages: HTML that opens from disk, with all that it needs inside.

Every page is a Jinja2 template with autoescaping, one style sheet, one script and one chart library
(Chart.js, MIT: NOTICE). A page asks nobody for anything: its content security policy forbids it,
and forbids any script but its own, whatever a file in the data set is called.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

CHARTS = "chart.umd.min.js"
CHARTS_SHA256 = "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
"""Of the file as the npm package chart.js 4.6.1 has it, dist/chart.umd.min.js."""


@cache
def asset(name: str) -> str:
    """A file of this folder: a style sheet or a script."""
    text = (resources.files(__name__) / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    if lines and lines[-1].startswith("//# sourceMappingURL="):  # a map that is not there
        text = "\n".join(lines[:-1]) + "\n"
    return text


def digest(text: str) -> str:
    """What a content security policy calls an inline script or style: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(name: str, scripts: tuple[str, ...] = (), **values: Any) -> str:
    """A self-contained page.

    Args:
        name: of the template, ``report.html``.
        scripts: the scripts that go into it, in order.
        values: for the template. ``data`` becomes JSON in the page, which its script reads.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__ or __name__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    style = asset("base.css")
    inline = [asset(script) for script in scripts]
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {digest(style)}; "
        f"script-src {' '.join(digest(script) for script in inline) or chr(39) + 'none' + chr(39)}"
    )
    return environment.get_template(name).render(
        style=style, inline=inline, policy=policy, **values
    )
