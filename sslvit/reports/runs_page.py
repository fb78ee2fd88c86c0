"""The page of all runs: a table that can be sorted and filtered, and chosen curves over each other, in one file."""

import json
import os
import time
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sslvit.reports import page
from sslvit.reports.charts import COLORS
from sslvit.reports.live import STYLE
from sslvit.reports.run_rows import RunRow, summary
from sslvit.runs.log import duration

EVERY, PATIENCE = 30, 600  # seconds until the browser reads again; after which a page is old if nobody writes it
SCRIPT = Path(__file__).with_name("runs.js")
RUNS_STYLE = """
body { max-width: 100rem; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: baseline; margin: 1rem 0 .5rem; }
.controls label { color: var(--faint); font-size: .9rem; }
select, input[type=search] { font: inherit; font-size: .95rem; color: var(--text); background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .5rem; max-width: 100%; }
.plot { display: grid; grid-template-columns: minmax(0, 1fr) minmax(12rem, 22rem); gap: 1rem; align-items: start; }
@media (max-width: 50rem) { .plot { grid-template-columns: minmax(0, 1fr); } }
#chart { min-height: 280px; } #chart svg { display: block; width: 100%; font: 12px system-ui, sans-serif; }
#chart text { fill: var(--text); } #chart .grid { stroke: var(--line); } #chart .axis { stroke: var(--text); }
#chart .guide { stroke: var(--faint); stroke-dasharray: 2 3; }
#legend { list-style: none; margin: 0; padding: 0; font-size: .9rem; max-height: 24rem; overflow-y: auto; }
#legend button { display: grid; grid-template-columns: 1.8rem minmax(0, 1fr) auto; gap: .5rem; width: 100%;
  align-items: center; font: inherit; color: inherit; background: none; border: 0; padding: .2rem; text-align: left;
  cursor: pointer; }
#legend button:hover { background: var(--back); } #legend [aria-pressed=false] { opacity: .6;
  text-decoration: line-through; }
#legend bdi { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#legend output { font-variant-numeric: tabular-nums; } #legend svg { width: 1.8rem; height: .8rem; }
#runs { width: 100%; } #runs td { vertical-align: baseline; } #runs tbody tr:hover { background: var(--back); }
#runs th, #runs td.text { text-align: left; } #runs th.number { text-align: right; }
#runs th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  white-space: nowrap; }
#runs th button::after { content: "\\2195"; color: var(--faint); padding-left: .2rem; font-weight: 400; }
#runs [aria-sort=ascending] button::after { content: "\\2191"; color: inherit; font-weight: 700; }
#runs [aria-sort=descending] button::after { content: "\\2193"; color: inherit; font-weight: 700; }
#runs { font-size: .88rem; } #runs th, #runs td { padding: .3rem .45rem; }
#runs td.long { max-width: 15rem; overflow: hidden; text-overflow: ellipsis; }
@media (max-width: 50rem) { #runs td.long { max-width: 9rem; } }
a { color: #0969da; } @media (prefers-color-scheme: dark) { a { color: #58a6ff; } }
"""
Cell = tuple[str, Any]  # its markup, and what it is sorted by: None comes last
EMPTY: Cell = ("", None)


def as_page(folder: Path, rows: list[RunRow], place: Path, watch: float) -> str:
    """place: where the page will lie. watch: seconds after which it is rewritten; 0: it is not."""
    going_on = watch > 0 or any(row.state == "running" for row in rows)
    every = max(watch, 5) if watch else EVERY if going_on else 0
    sections = [
        state(summary(rows), every, max(PATIENCE, 4 * watch), folder),
        '<div class="controls"><label>Curves of <select id="metric"></select></label> '
        '<label>over <select id="across"><option>images</option><option>steps</option><option>hours</option></select>'
        '</label> <label><input type="checkbox" id="logY"> log y</label> '
        '<label><input type="checkbox" id="logX"> log x</label></div>',
        '<div class="plot"><div id="chart"></div><ul id="legend"></ul></div>',
        '<div class="controls"><label>Show runs with <input type="search" id="filter" placeholder="text"></label> '
        '<span class="faint" id="count"></span></div>',
        table(rows, place),
        f'<script type="application/json" id="data">{embedded(rows)}</script>',
        f"<script>{SCRIPT.read_text()}</script><script>{page.REFRESH.read_text()}</script>",
    ]
    name = folder.resolve().name or str(folder)
    return page.page(f"Runs in {name}", sections, head=f"<style>{STYLE}{RUNS_STYLE}</style>")


def state(sentence: str, every: float, patience: float, folder: Path) -> str:
    stale = f"This page is <b></b> old. To keep it new: <code>sslvit runs {escape(str(folder))} --watch {EVERY}</code>"
    return page.state(f'<p class="lead">{escape(sentence)}</p>', stale, every=every, patience=patience)


def embedded(rows: list[RunRow]) -> str:
    """JSON that cannot end the script that it is in."""
    runs = [{"name": legible(row.name), "state": row.state, **row.curves} for row in rows]
    text = json.dumps({"colors": COLORS, "runs": runs}, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def legible(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def table(rows: list[RunRow], place: Path) -> str:
    columns = {title: cells for title, cells in columns_of(rows, place).items() if any(text for text, _ in cells)}
    numeric = {title for title, cells in columns.items() if any(isinstance(key, int | float) for _, key in cells)}
    head = ["<th></th>"]
    for title in columns:
        kind = ' class="number"' if title in numeric else ""
        head.append(f'<th{kind} aria-sort="none"><button type="button">{escape(title)}</button></th>')
    body = []
    for i, row in enumerate(rows):
        name = escape(legible(row.name))
        cells = [f'<td><input type="checkbox" aria-label="{name}"></td>']
        for title, column in columns.items():
            text, key = column[i]
            kind = (
                ""
                if title in numeric
                else ' class="text long"'
                if title in ("run", "data", "note")
                else ' class="text"'
            )
            sorted_by = "" if key is None else f' data-key="{escape(str(key))}"'
            full = f' title="{escape(str(key))}"' if "long" in kind and key else ""
            cells.append(f"<td{kind}{sorted_by}{full}>{text}</td>")
        body.append(f'<tr data-run="{i}">{"".join(cells)}</tr>')
    rest = "".join(body)
    return (
        f'<div class="wide"><table id="runs"><thead><tr>{"".join(head)}</tr></thead><tbody>{rest}</tbody></table></div>'
    )


def columns_of(rows: list[RunRow], place: Path) -> dict[str, list[Cell]]:
    """A cell for each row, by title."""
    protocols = sorted({name for row in rows for name in row.accuracies}, key=lambda name: ("-nn" not in name, name))
    columns: dict[str, list[Cell]] = {
        "run": [(link(row, place), legible(row.name)) for row in rows],
        "state": [(f'<span class="chip {row.state}">{row.state}</span>', row.state) for row in rows],
        "epochs": [(escape(row.progress), row.share) for row in rows],
    }
    for name in protocols:
        columns[f"{name}, %"] = [gain(row.accuracies.get(name)) for row in rows]
    return columns | {
        "test, %": [number_cell(row.tested, ".1f") for row in rows],
        "loss": [number_cell(row.loss, ".4g") for row in rows],
        "time": [(duration(row.seconds), row.seconds) if row.seconds else EMPTY for row in rows],
        "images/s": [number_cell(row.speed, ",.0f") for row in rows],
        "objective": [text_cell(row.objective) for row in rows],
        "model": [text_cell(row.backbone) for row in rows],
        "last line": [when(row.changed) for row in rows],
        "images": [number_cell(row.images, ",") for row in rows],
        "FLOPs": [number_cell(row.flops, ".1e") for row in rows],
        "data": [text_cell(row.data) for row in rows],
        "note": [text_cell(row.note) for row in rows],
    }


def link(row: RunRow, place: Path) -> str:
    name, report = f"<bdi>{escape(legible(row.name))}</bdi>", row.folder.absolute() / "report.html"
    if not report.exists():
        return name
    return f'<a href="{quote(os.fsencode(os.path.relpath(report, place)))}">{name}</a>'


def text_cell(text: str) -> Cell:
    return (f"<bdi>{escape(legible(text))}</bdi>", legible(text)) if text else EMPTY


def number_cell(value: float | None, form: str) -> Cell:
    return EMPTY if value is None else (format(value, form), value)


def gain(accuracy: tuple[float, float] | None) -> Cell:
    return (f"{accuracy[0]:.1f} \N{RIGHTWARDS ARROW} {accuracy[1]:.1f}", accuracy[1]) if accuracy else EMPTY


def when(changed: float) -> Cell:
    """The time of today, else the date."""
    if not changed:
        return EMPTY
    day, clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed)).split()
    return (clock if day == time.strftime("%Y-%m-%d") else day), round(changed)
