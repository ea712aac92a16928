"""The page: one file that asks for no other, opens without a server, and can be read without its script."""

import base64
import hashlib
import os
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element

import taperlit
from taperlit.checkpoint.atomic import write_file
from taperlit.errors import TaperlitError
from taperlit.report.markup import el, html
from taperlit.report.parts import Parts, Wish
from taperlit.report.run import Run, names_of
from taperlit.report.sections import run_section
from taperlit.report.side_by_side import comparison

GENERATOR = "taperlit report"
DOCTYPE = "<!doctype html>\n"


def build_page(runs: Sequence[Run], parts: Sequence[Parts], wish: Wish) -> str:
    """The page as text.

    Args:
        runs: at least one; the others are compared with the first.
        parts: of each run.
        wish: what samples were wanted.
    """
    names = names_of(runs)
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    sections = [
        run_section(i, name if len(runs) > 1 else "", run, part, wish.samples)
        for i, (name, run, part) in enumerate(zip(names, runs, parts, strict=True))
    ]
    several = len(runs) > 1
    style, script = _resource("page.css"), _resource("page.js")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        _policy(style, script),
        el("meta", name="generator", content=GENERATOR),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} \u00b7 {GENERATOR}"),
        el("style", style),
    )
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = el(
        "body",
        el("header", el("h1", title), _menu(names) if several else None, class_="top"),
        el("main", comparison(names, runs) if several else None, sections),
        el("footer", f"taperlit {taperlit.__version__}, {made}"),
        el("div", id="tip", hidden=True),
        el("script", script),
    )
    return DOCTYPE + html(el("html", head, body, lang="en")) + "\n"


def check_page(path: Path) -> None:
    """Refuse a place for the page before anything is read.

    Raises:
        TaperlitError: something else than a report is there, or nothing can be written.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise TaperlitError(f"{path}: there is no folder {folder}; make it first.")
    if path.exists() and not _is_report(path):
        raise TaperlitError(f"{path} is there and is no report; name another --out.")
    if not os.access(folder, os.W_OK):
        raise TaperlitError(f"{path} cannot be written: its folder is read-only.")


def write_page(path: Path, text: str) -> None:
    """Write the page aside, and give it its name when it is whole.

    Raises:
        TaperlitError: it cannot be written.
    """
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _is_report(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return f'content="{GENERATOR}"' in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def _menu(names: Sequence[str]) -> Element:
    links = [el("a", "side by side", href="#runs"), *(el("a", name, href=f"#run-{i}") for i, name in enumerate(names))]
    return el("nav", links)


def _policy(style: str, script: str) -> Element:
    """What the browser is to allow: this page's own style and script, and nothing from anywhere."""
    rules = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return el("meta", http_equiv="Content-Security-Policy", content=rules)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _resource(name: str) -> str:
    """A file of the package that is put into the page; newlines as a browser counts them."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
