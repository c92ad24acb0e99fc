"""The page: one file that needs no other, whatever its words hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from svdexpert.page import Part, write_page
from svdexpert.report import draw_shares, draw_turns

VOID = {"meta", "img"}


class Tags(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_whole_and_escapes_what_it_holds(tmp_path: Path) -> None:
    shares, turns = tmp_path / "shares.png", tmp_path / "turns.png"
    draw_shares([[0.5, float("nan")], [1.0, 0.0]], ["a", "b"], ["c", "d"], shares)
    draw_turns([{"ask": 1.0}, {}, {"ask": 0.5, "doubt": 0.5}], ["ask", "doubt"], ["one", "two", "three"], turns)
    parts = [
        Part("First <b>", ["so & so"], picture=shares, alt='shares "of" all'),
        Part("Second", picture=turns, head=("x", "y"), rows=[("1", "<script>alert(1)</script>")], code=["a < b"]),
    ]
    write_page(tmp_path / "page.html", "Title", "lead", parts, "foot")
    text = (tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    for words in ("First <b>", "so & so", "<script>alert(1)</script>", "a < b", "foot"):
        assert words in tags.text
    assert "<script>" not in text
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "prefers-color-scheme: dark" in text
