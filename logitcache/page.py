"""Pages that commands write: one HTML file without any outside resource, of templates that escape.

What comes from documents, prompts and generations is hostile until it is text: every value passes
``visible`` and then jinja2's escaping, data for scripts is JSON in which no < remains, and a
Content-Security-Policy allows the page's own style and script, by their hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import unicodedata
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .errors import UsageError
from .files import write_atomic

_DOCTYPE = "<!doctype html>"
# Joiners shape letters and emoji; other format characters (bidi overrides, tags) hide or reorder.
_KEPT = "\n\t\u200c\u200d"
_HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
_CONTROL_PICTURES = 0x2400


def visible(text: str) -> str:
    """Text in which characters that act instead of being seen are named: controls, line
    separators, bidi overrides, lone surrogates. Line feeds and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


@lru_cache(maxsize=4096)
def _visible_character(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    return chr(_CONTROL_PICTURES + code) if code < 0x20 else f"<U+{code:04X}>"


def number(value: Any, digits: int = 3) -> str:
    """A number as a person reads it: integers with separators, others with significant digits."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) < 1e-2:
        return f"{value:.{digits}g}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(digits - whole, 0)}f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    if not isinstance(value, (int, float)):
        return "\u2013"
    if not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.{digits}f}\u2009%"


def size(num_bytes: Any) -> str:
    """Bytes in the unit that suits them."""
    if not isinstance(num_bytes, (int, float)):
        return "\u2013"
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:,.0f}\u2009{unit}" if unit == "bytes" else f"{num_bytes:,.1f}\u2009{unit}"


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(str(value))


def _environment(package: str) -> Environment:
    loaders = [PackageLoader(name) for name in dict.fromkeys((package, "logitcache"))]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = {"number": number, "percent": percent, "size": size}
    environment.filters |= forms
    environment.globals |= {**forms, "zip": zip}
    return environment


def _source(package: str, name: str) -> str:
    return (resources.files(package) / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render_page(package: str, name: str, **values: Any) -> str:
    """Render ``templates/NAME.html`` of a package, which extends base.html, with its own
    ``NAME.css`` and ``NAME.js`` where it has them."""
    files = {path.name for path in (resources.files(package) / "templates").iterdir()}
    style = _source("logitcache", "base.css")
    if f"{name}.css" in files:
        style += _source(package, f"{name}.css")
    script = _source(package, f"{name}.js") if f"{name}.js" in files else ""
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script) if script else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return (
        _environment(package)
        .get_template(f"{name}.html")
        .render(
            policy="; ".join(f"{key} {value}" for key, value in policy.items()),
            style=Markup(style),  # our own files
            script=Markup(script),
            **values,
        )
    )


def check_target(path: Path, *sources: Path) -> None:
    """Refuse, before any work, to write a page over what is no page, or into a store."""
    if path.is_dir():
        raise UsageError(f"--html {path}: expected a file, found a folder", f"--html {path}/a.html")
    if path.exists() or path.is_symlink():
        begins = None
        if path.is_file():
            with open(path, "rb") as file:
                begins = file.read(len(_DOCTYPE))
        if begins not in (b"", _DOCTYPE.encode()):
            raise UsageError(
                f"--html {path}: expected a new file or an earlier page, found another file",
                "give --html another name",
            )
    for source in sources:
        if path.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"--html {path}: lies in the store {source}", "put the page elsewhere")


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    assert text.startswith(_DOCTYPE)  # what check_target knows a page by
    write_atomic(path, text)
