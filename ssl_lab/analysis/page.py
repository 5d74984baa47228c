"""One page that shows the pictures of an encoder: plain HTML that opens from disk, with nothing from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ssl_lab.files import write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
figure { margin: 2rem 0 }
img { max-width: 100%; height: auto }
figcaption { color: #555 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left }
"""


@dataclass(frozen=True)
class Picture:
    """A picture file in the page's folder, with its heading and what a reader should know to read it."""

    file: str
    title: str
    caption: str


def write_page(
    folder: Path,
    title: str,
    pictures: Sequence[Picture],
    *,
    notes: Sequence[str] = (),
    table: Sequence[Sequence[str]] = (),
) -> Path:
    """Write `index.html` into `folder`: the table (first row = heads), the pictures, then the notes; gives its path."""
    parts = [f"<h1>{escape(title)}</h1>"]
    if table:
        head, *rows = table
        lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append("<table>\n" + "\n".join(lines) + "\n</table>")
    for picture in pictures:
        name = escape(picture.title)
        parts.append(
            f'<figure>\n<h2>{name}</h2>\n<img src="{escape(picture.file, quote=True)}" alt="{name}">\n'
            f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
        )
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>'
    path = folder / "index.html"
    folder.mkdir(parents=True, exist_ok=True)
    body = "\n".join(parts)
    write_text(path, f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n')
    return path
