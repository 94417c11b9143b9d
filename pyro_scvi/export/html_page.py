"""A self-contained HTML page of text, tables and pictures; text from data is escaped."""

import base64
import html
from collections.abc import Sequence

from pyro_scvi.utils.control_characters import spelled_out


class Html(str):
    """Markup that is inserted unescaped; any other string is escaped."""


Section = tuple[str, Sequence[str]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --line: #dfe2e7; --back: #ffffff; --box: #f5f6f8;
  --shade: #00000038 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #a0a7b4; --line: #363b44; --back: #16181c; --box: #1f2228; --shade: #ffffff38 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.5rem }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .75rem 0; background:
  linear-gradient(to right, var(--back) 30%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--back) 30%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat scroll }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 500 }
tbody th { color: inherit; font-weight: inherit }
.number { text-align: right; white-space: nowrap; padding-right: 1.25rem }
thead th { vertical-align: bottom }
thead .number { white-space: normal }
td:last-child, th:last-child { padding-right: 0 }
td:not(.number) { color: var(--soft); min-width: 6rem }
.wide:not(.facts) tbody th { min-width: 9rem }
.wide:not(.facts) th:first-child { position: sticky; left: 0; z-index: 1; background: var(--back) }
.notes { color: var(--soft); font-size: .9rem }
.notes p { margin: .15rem 0 }
.facts td:not(.number) { min-width: 0; overflow-wrap: anywhere }
@media (min-width: 64rem) {
  .wide:not(.facts) { width: fit-content; min-width: 100%; max-width: calc(100% + 50vw - 31rem) }
}
pre { margin: .5rem 0; padding: .75rem 1rem; border-radius: 6px; background: var(--box); overflow-x: auto;
  font: .875rem/1.5 ui-monospace, monospace }
.pictures { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: flex-start }
figure { margin: .75rem 0; max-width: 100% }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .9rem; max-width: 40rem }
@media (max-width: 34rem) {
  body { padding: 1.25rem 1rem 3rem }
  .wide:not(.facts) { font-size: .85rem }
  .wide:not(.facts) tbody th { min-width: 6.5rem; max-width: 6.5rem; overflow-wrap: anywhere }
  .facts tr { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; padding: .4rem 0;
    border-bottom: 1px solid var(--line) }
  .facts th, .facts td { border: 0; padding: 0 .5rem 0 0 }
  .facts td { font-size: .9rem }
  .facts .number { padding: 0 }
  .facts .number + * { grid-column: 1 / -1 }
  figure { overflow-x: auto }
  img { width: max(100%, min(34rem, var(--own, 34rem))) }
  figcaption { position: sticky; left: 0; max-width: calc(100vw - 2rem) }
}
"""


def page(title: str, sections: Sequence[Section]) -> str:
    """Return an HTML page that needs no other file and sends no request.

    Parameters
    ----------
    title
        Plain text.
    sections
        Pairs of heading (plain text, may be empty) and blocks: what :func:`table`, :func:`picture` and :func:`code`
        return, or plain text, which becomes a paragraph.
    """
    body = "\n".join(_section(heading, blocks) for heading, blocks in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{_escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, numbers: Sequence[int] = ()) -> Html:
    """A table of plain text; the first column holds row headings, columns in ``numbers`` are right-aligned.

    On a phone, tables of two or three columns give the third a line of its own.
    """
    head = f"<thead><tr>{_cells(header, 'th', numbers, 0)}</tr></thead>" if header else ""
    body = "\n".join(f"<tr>{_heading(row[0])}{_cells(row[1:], 'td', numbers, 1)}</tr>" for row in rows)
    kind = " facts" if all(len(row) <= 3 for row in rows) else ""
    return Html(f'<div class="wide{kind}"><table>{head}<tbody>\n{body}\n</tbody></table></div>')


def picture(png: bytes, alt: str, caption: str = "", *, width: int | None = None) -> Html:
    """A PNG inside the page, with its description, at most ``width`` CSS pixels wide."""
    data = base64.b64encode(png).decode("ascii")
    size = f' style="--own: {width}px; width: {width}px"' if width else ""
    below = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return Html(f'<figure{size}><img src="data:image/png;base64,{data}" alt="{_escape(alt)}">{below}</figure>')


def beside(*blocks: str) -> Html:
    """Blocks next to each other where the screen is wide enough."""
    return Html(f'<div class="pictures">{"".join(map(_block, blocks))}</div>')


def subheading(text: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{_escape(text)}</h3>")


def footnotes(texts: Sequence[str]) -> Html:
    """Footnotes of a table, one per line."""
    lines = "".join(f"<p>{_escape(text)}</p>" for text in texts)
    return Html(f'<div class="notes">{lines}</div>')


def code(text: str) -> Html:
    """Text in a fixed-width font, its lines kept."""
    return Html(f"<pre>{_escape(text)}</pre>")


def _section(heading: str, blocks: Sequence[str]) -> str:
    head = f"<h2>{_escape(heading)}</h2>\n" if heading else ""
    return f"<section>\n{head}" + "\n".join(map(_block, blocks)) + "\n</section>"


def _block(block: str) -> str:
    return block if isinstance(block, Html) else f"<p>{_escape(block)}</p>"


def _heading(text: str) -> str:
    return f'<th scope="row">{_escape(text)}</th>'


def _cells(texts: Sequence[str], tag: str, numbers: Sequence[int], first: int) -> str:
    return "".join(
        f"<{tag}{' class=number' if column in numbers else ''}>{_escape(text)}</{tag}>"
        for column, text in enumerate(texts, first)
    )


def _escape(text: str) -> str:
    return html.escape(spelled_out(text))
