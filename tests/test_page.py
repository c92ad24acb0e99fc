"""The page: one file that needs no other, whatever its words hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium (Debian's package) is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (1280, 0), (400, 1), (400, 0)])
def test_a_browser_shows_it(width: int, scheme: int, tmp_path: Path) -> None:
    """By day (1) and by night (0), as wide as a desk and as a phone: paper of that colour, and ink on it."""
    picture, shot = tmp_path / "shares.png", tmp_path / "shot.png"
    draw_shares([[0.5]], ["a"], ["b"], picture)
    part = Part("Heading", ["words " * 40], picture, "shares", ("x", "y"), [("1", "much " * 30)])
    write_page(tmp_path / "page.html", "Title", "lead", [part])
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={shot}"]
    command += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}"]
    subprocess.run([*command, (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    seen = imread(shot)[..., :3].mean(-1)
    paper = float(np.median(seen))
    assert paper > 0.9 if scheme else paper < 0.2
    assert float(np.abs(seen - paper).max()) > 0.6
    assert float(np.abs(seen[:, -8:] - paper).max()) < 0.05  # nothing runs over the right edge
