"""One HTML file from a dashboard and the files of the template.

Text of the data reaches the page as JSON in a script element that is never run, and from there as text nodes alone.
The policy in the page's head lets the browser run the template's own script, apply its own style, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from crosscoder.dashboard.encoding import encode
from crosscoder.dashboard.records import Dashboard
from finqa.paths import write_atomically

TEMPLATE = Path(__file__).parent / "template"
SCRIPTS = ("data.js", "charts.js", "filters.js", "table.js", "passages.js", "latent.js", "main.js")
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
    parts = {
        "title": html.escape(dashboard.title),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        "style": style,
        "data": safe_json(encode(dashboard)),
        "script": script,
    }
    # In one go, so that a mark inside the data stays data.
    return re.sub(r"{{(\w+)}}", lambda mark: parts[mark[1]], (TEMPLATE / "dashboard.html").read_text())


def safe_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment: ASCII without < > &."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # These stand in JSON inside strings alone, where an escape says the same.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
