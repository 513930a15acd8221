"""Render HTML pages from the files in `templates/`, escaping every value.

So a rollout that contains `<script>` is shown, never run. A page loads no other files: its style
and its script are inline, and its Content-Security-Policy allows only that script.
"""

import base64
import hashlib
import re
import time
from functools import cache
from typing import Any

import jinja2

from opsd.common.format import duration, percent, size
from opsd.report.charts import short

_NOT_IN_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, **values: Any) -> str:
    """Render a file of `templates/` with these values and the current time."""
    written = time.strftime("%Y-%m-%d %H:%M")
    return environment().get_template(template).render(values, written=written)


@cache
def environment() -> jinja2.Environment:
    """Jinja's environment with autoescape; undefined names in a template are errors."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("opsd.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False}
    made.filters |= {
        "duration": duration,
        "interval": interval,
        "percent": percent,
        "points": points,
        "size": size,
        "whole": "{:,.0f}".format,
    }
    made.globals |= {"asset": _asset, "csp_hash": _csp_hash, "short": short}
    return made


def clean(content: Any) -> Any:
    """Replace characters that HTML may not contain, control characters and lone surrogates, by
    U+FFFD, and None by "". Other values that are not strings are returned as they are."""
    if type(content) is str:
        text = content.replace("\r\n", "\n").replace("\r", "\n")
        return _NOT_IN_HTML.sub("\N{REPLACEMENT CHARACTER}", text)
    return "" if content is None else content


def interval(rate: Any) -> str:
    """A rate's interval in percent, cut to 0…100; a dash if it is unknown."""
    if rate.low is None:
        return "–"  # noqa: RUF001 - a dash
    return f"{100 * max(0.0, rate.low):.1f}–{100 * min(1.0, rate.high):.1f}"  # noqa: RUF001


def points(change: float) -> str:
    """A difference of two rates in percentage points, with its sign."""
    return f"{100 * change:+.1f}".replace("-", "−")  # noqa: RUF001 - a minus sign


def _asset(name: str) -> str:
    """The unescaped text of a file in `templates/`: our own style or script."""
    made = environment()
    assert made.loader is not None
    return made.loader.get_source(made, name)[0]


def _csp_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
