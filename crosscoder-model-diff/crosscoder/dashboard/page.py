"""One HTML file from a dashboard and the files of the template.

The data are in a script element that is never run, as compressed JSON in base64: that makes a page of 16,384 latents a
third as large, and any browser since 2023 can unpack it. open.js replaces the data by the JSON and then runs the other
scripts, which add text of the data to the page as text nodes only. The content security policy in the page's head lets
the browser run the template's own two scripts, apply its own style, and load nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from crosscoder.dashboard.encoding import encode
from crosscoder.dashboard.records import Dashboard
from finqa.runtime.paths import write_atomically

TEMPLATE = Path(__file__).parent / "template"
SCRIPTS = ("data.js", "charts.js", "filters.js", "table.js", "summary.js", "passages.js", "latent.js", "main.js")
"""In the order in which they are put together."""


def write_dashboard(path: Path, dashboard: Dashboard) -> int:
    """Write the file, and return its size in bytes."""
    page = render(dashboard).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return len(page)


def render(dashboard: Dashboard) -> str:
    """The HTML, which is ASCII but for the template's own text."""
    style = f"\n{(TEMPLATE / 'dashboard.css').read_text()}"
    script = '\n"use strict";\n' + "".join((TEMPLATE / name).read_text() for name in SCRIPTS)
    opening = f"\n{(TEMPLATE / 'open.js').read_text()}"
    scripts = f"script-src '{_hash(opening)}' '{_hash(script)}'"
    parts = {
        "title": html.escape(dashboard.title),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; {scripts}",
        "style": style,
        "data": packed(encode(dashboard)),
        "script": script,
        "opening": opening,
    }
    # All marks are replaced in one pass, so that one inside the data is left alone.
    return re.sub(r"{{(\w+)}}", lambda mark: parts[mark[1]], (TEMPLATE / "dashboard.html").read_text())


def packed(data: Any) -> str:
    """JSON, compressed, in base64; the same text for the same data."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
