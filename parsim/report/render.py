"""A Page as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from parsim.report.page import Page
from parsim.report.theme import themes

FOLDER = Path(__file__).parent
STYLES = ("page.css", "parts.css")
SCRIPTS = ("page.js", "table.js", "schedule_view.js", "schedule.js")


def render(page: Page) -> str:
    """The page as HTML: the same bytes for the same page.

    Texts are escaped wherever they stand; data for scripts holds no character that could end its tag.
    The page's own policy lets no request leave it and no script run but those hashed in it.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = embedded
    environment.filters["data_url"] = data_url
    script = "\n".join(_asset(name) for name in SCRIPTS)
    return environment.get_template("page.html.j2").render(
        page=page,
        style=_trusted("\n".join([*_color_rules(), *(_asset(name) for name in STYLES)])),
        script=_trusted(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colors=themes(),
    )


def embedded(data: object) -> Markup:
    """JSON that can stand in a script element whatever its texts hold.

    >>> embedded({"name": "</script>"})
    Markup('{"name":"\\\\u003c/script\\\\u003e"}')
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _trusted(text)


def _trusted(text: str) -> Markup:
    """Text of our own, or without anything that HTML reads, which is not escaped."""
    return Markup(text)  # noqa: S704


def data_url(text: str) -> str:
    """A JSON text as an address that holds it."""
    return "data:application/json;base64," + base64.b64encode(text.encode()).decode()


def _asset(name: str) -> str:
    return (FOLDER / "assets" / name).read_text(encoding="utf-8").strip()


def _color_rules() -> list[str]:
    """Each theme's colours as custom properties."""
    light, dark = (
        "".join(f"--{key.replace('_', '-')}:{color};" for key, color in colors.items())
        for colors in themes().values()
    )
    return [
        f":root{{{light}}}",
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}",
        f":root[data-theme=dark]{{{dark}}}",
        f"@media print{{:root,:root[data-theme=dark],:root:not([data-theme=light]){{{light}}}}}",
    ]
