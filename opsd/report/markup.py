"""HTML that is escaped unless it says otherwise.

`tag("p", text)` escapes `text`; only what `tag` itself returned (an `Html`) passes unescaped. So a
rollout that contains `<script>` is shown, never run.
"""

import html
import json
import math
from typing import Any


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


VOID = {"br", "meta", "circle", "line", "path", "rect"}


def escape(content: Any) -> str:
    """`content` as HTML: `Html` as it is, lists joined, None as nothing, all else escaped."""
    if content is None:
        return ""
    if isinstance(content, Html):
        return content
    if isinstance(content, (list, tuple)):
        return "".join(map(escape, content))
    return html.escape(str(content), quote=True)


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. A trailing `_` is dropped from attribute names and other `_` become `-`
    (`class_`, `data_x`); attributes that are None or False are left out, True stands alone."""
    parts = [name]
    for key, content in attributes.items():
        if content is None or content is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if content is True else f'{key}="{escape(str(content))}"')
    if name in VOID:
        return Html(f"<{' '.join(parts)}>" if name in ("br", "meta") else f"<{' '.join(parts)}/>")
    return Html(f"<{' '.join(parts)}>{escape(children)}</{name}>")


def embed_json(content: Any, identifier: str) -> Html:
    """Data for scripts: `</` cannot end the element, and NaN, which is no JSON, becomes null."""
    text = json.dumps(_finite(content), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Html(f'<script type="application/json" id="{escape(identifier)}">{text}</script>')


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(item) for key, item in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(item) for item in content]
    return content
