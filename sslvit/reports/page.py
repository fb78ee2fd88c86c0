"""A page in one HTML file with its charts and pictures in it, for screens, phones, paper and dark mode."""

import base64
import time
from collections.abc import Set
from datetime import UTC, datetime
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark;
  --text: #1b1f24; --paper: #ffffff; --faint: #6a737d; --line: #d0d7de; --back: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --paper: #0d1117; --faint: #9198a1; --line: #3d444d; --back: #161b22; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 68rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.lead { font-size: 1.1rem; } .faint, figcaption { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; } .wide + .wide { margin-top: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
.small img { image-rendering: pixelated; width: 100%; max-width: 40rem; }
.chart { width: 100%; max-width: 34rem; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--text); } .chart .grid { stroke: var(--line); } .chart .axis { stroke: var(--text); }
details { margin: .7rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; } pre { overflow-x: auto; background: var(--back); padding: .6rem;
  font-size: .8rem; }
@media (max-width: 30rem) { .chart { font-size: 13px; } }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
@media print { body { max-width: none; font-size: 11pt; } figure, .wide { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } table { font-size: 7pt; } th, td { padding: .1rem .25rem; } }
"""
REFRESH = Path(__file__).with_name("refresh.js")


def page(title: str, sections: list[str], *, head: str = "") -> str:
    """head: markup for the page's head."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{head}</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def state(inside: str, stale: str, *, every: float, patience: float) -> str:
    """The first lines of a page that reloads itself by refresh.js, with when it was written. All are markup.

    every: seconds after which the browser reads it again; 0: never. stale: what stands there once it is older than
    patience; 0: never. Its <b> shows the age."""
    now = time.time()
    stamp = datetime.fromtimestamp(now, UTC).isoformat(" ", "seconds")
    return (
        f'<div id="state" data-written="{now:.0f}" data-every="{every:g}" data-patience="{patience:.0f}">{inside}'
        f'<p class="faint">Written <time>{stamp}</time><span id="age"></span>.</p>'
        f'<p id="stale" hidden>{stale}</p></div>'
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(sentences: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in sentences)}</ul>" if sentences else ""


def table(header: list[str], rows: list[list[str]], best: Set[tuple[int, int]] = frozenset()) -> str:
    """best: cells, by row and column, in bold."""
    head = "".join(f"<th>{escape(cell).replace(' %', '&nbsp;%')}</th>" for cell in header)
    body = []
    for i, row in enumerate(rows):
        kinds = [' class="best"' if (i, j) in best else "" for j in range(len(row))]
        body.append("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)))
    rest = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rest}</tbody></table></div>'


def picture(file: Path, caption: str, *, small: bool = False) -> str:
    """small: of few pixels, shown as squares. Empty if there is no such file."""
    if not file.exists():
        return ""
    vector = file.suffix == ".svg"
    data = f"data:image/{'svg+xml' if vector else 'png'};base64,{base64.b64encode(file.read_bytes()).decode()}"
    kind = ' class="small"' if small and not vector else ""
    text = escape(caption)
    return f'<figure{kind}><img alt="{text}" src="{data}"><figcaption>{text}</figcaption></figure>'


def alone(svg: str) -> str:
    """A chart as a file of its own, on white."""
    style = "text { font: 12px system-ui, sans-serif } .grid { stroke: #d0d7de } .axis { stroke: #1b1f24 }"
    box = '<rect width="100%" height="100%" fill="#fff"/>'
    head, _, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{box}{rest}\n' if svg else ""


def chart(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""


def folded(title: str, *sections: str) -> str:
    inside = "".join(filter(None, sections))
    return f"<details><summary>{escape(title)}</summary>{inside}</details>" if inside else ""


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def columns(*sections: str) -> str:
    inside = "".join(f"<div>{part}</div>" for part in sections if part)
    return f'<div class="columns">{inside}</div>' if inside else ""
