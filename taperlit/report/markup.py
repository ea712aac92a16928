"""HTML as a tree of elements: text that comes from files cannot become markup, and every tag is closed."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "str | Element | Iterable[Child] | None"

# No character reference can stand for these in HTML, and lone surrogates have no bytes.
NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def el(tag: str, *children: Child, **attributes: Any) -> Element:
    """An element.

    Args:
        tag: its name.
        children: texts, elements, or iterables of both; None is nothing.
        attributes: by name, where ``_`` stands for ``-`` and one at the end is dropped, as in ``class_``; True is an
            attribute without a value, None and False are none.
    """
    element = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            element.set(name.rstrip("_").replace("_", "-"), "" if value is True else clean(value))
    _append(element, children)
    return element


def clean(value: Any) -> str:
    """A value as text of characters that HTML can have; others are shown as U+FFFD."""
    return NO_TEXT.sub("\ufffd", str(value))


def html(root: Element) -> str:
    """The element as HTML."""
    return tostring(root, encoding="unicode", method="html")


def _append(element: Element, children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif isinstance(child, str):
            text = clean(child)
            if len(element):
                element[-1].tail = (element[-1].tail or "") + text
            else:
                element.text = (element.text or "") + text
        elif child is not None:
            _append(element, child)


def table(headings: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str | None = None) -> Element:
    """A table whose first column names the rows; it scrolls sideways where the page is narrow."""
    head = el("thead", el("tr", [el("th", heading, scope="col") for heading in headings]))
    body = [el("tr", el("th", first, scope="row"), [el("td", cell) for cell in rest]) for first, *rest in rows]
    inner = el("table", el("caption", caption) if caption else None, head, el("tbody", body))
    return el("div", inner, class_="scroll")


def missing(what: str, command: str | None = None) -> Element:
    """One line on what is not there, with the command that makes it."""
    return el("p", what, [" ", el("code", command)] if command else None, class_="missing")


def folding(summary: Child, *children: Child, open_: bool = False) -> Element:
    """A part that opens and closes."""
    return el("details", el("summary", summary), *children, open=open_)
