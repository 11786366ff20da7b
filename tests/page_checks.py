"""What tests of pages share."""

from __future__ import annotations

from pathlib import Path

from browser import Page
from click.testing import CliRunner

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'> \" ' ` & &lt;",
    "line\u2028separator \x1b[31mred\x1b[0m \x00 nul {{ 7 * 7 }} {% raw %}",
    "\u202eoverride \u05d0\u05d1\u05d2 \u0627\u0644 \U0001f600 e\u0301 <!-- --> ]]>",
]


def run_cli(cli, *arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def check_quiet(page: Page, file: Path) -> None:
    """Nothing on the console, and nothing was asked for but the file."""
    assert page.problems() == []
    assert page.requests() == [file.resolve().as_uri()]


def check_harmless(page: Page, file: Path, scripts: int) -> None:
    assert page.run("window.hacked === undefined")
    assert page.run("document.querySelectorAll('img, iframe, object, link').length") == 0
    assert page.run("document.scripts.length") == scripts
    check_quiet(page, file)
