"""One self-contained HTML page: headings, words, tables and pictures, for a desk and a phone, by day and by night."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from svdexpert.storage import whole_file


@dataclass(frozen=True)
class Part:
    """A section of a page.

    Attributes:
        heading: of the section.
        words: paragraphs.
        picture: PNG that is put into the page; None for none.
        alt: what the picture shows, for those who do not see it.
        head: of a table, by column; none where there is no table.
        rows: of the table.
        code: commands, a line each.
    """

    heading: str
    words: Sequence[str] = ()
    picture: Path | None = None
    alt: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    code: Sequence[str] = ()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ink: #1b1f24; --paper: #fdfdfc; --line: #d7dade; --soft: #5c6670; --card: #f2f3f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #15181b; --line: #3a4046; --soft: #9aa4ae; --card: #1f2327; }
}
body { margin: 0 auto; padding: 1.2rem; max-width: 52rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p.lead { font-size: 1.1rem; color: var(--soft); }
figure { margin: 1rem 0; padding: 0.6rem; background: white; border: 1px solid var(--line); border-radius: 6px; }
img { display: block; margin: auto; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.7rem 0.3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.short { white-space: nowrap; }
pre { background: var(--card); padding: 0.8rem; overflow-x: auto; border-radius: 6px; font-size: 0.88rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: 0.85rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for part in parts %}
<section>
<h2>{{ part.heading }}</h2>
{% for words in part.words %}<p>{{ words }}</p>
{% endfor %}
{% if part.picture %}<figure>
<img src="data:image/png;base64,{{ picture(part.picture) }}" alt="{{ part.alt }}">
</figure>{% endif %}
{% if part.head %}<div class="wide"><table>
<thead><tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.rows %}<tr>
{% for cell in row %}<td{% if cell|length < 28 %} class="short"{% endif %}>{{ cell }}</td>{% endfor %}
</tr>{% endfor %}</tbody></table></div>{% endif %}
{% if part.code %}<pre>{% for line in part.code %}{{ line }}
{% endfor %}</pre>{% endif %}
</section>
{% endfor %}
<footer>{{ foot }}</footer>
</body>
</html>
"""


def write_page(path: Path, title: str, lead: str, parts: Sequence[Part], foot: str = "") -> None:
    """Write a page; it needs no other file and no network.

    Args:
        path: of the page.
        title: of the page.
        lead: what it says, in a sentence or two.
        parts: its sections.
        foot: with what it was made.
    """
    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    text = page.render(title=title, lead=lead, parts=parts, foot=foot, picture=_encoded)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode("ascii")
