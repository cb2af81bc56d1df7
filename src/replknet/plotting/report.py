"""A report as one HTML file that needs nothing else: pictures are inside, and there is no script."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from replknet.plotting._figures import style

_CSS = """
:root { --ink: #1b2733; --soft: #5b6b7a; --line: #dfe5ea; --paper: #fff; --ground: #f3f5f7; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 20px 64px; }
header { margin-bottom: 28px; }
h1 { margin: 0 0 6px; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; }
header p { margin: 0; color: var(--soft); max-width: 68ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-bottom: 20px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: 13.5px; line-height: 1.35; margin-top: 4px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 26px 24px;
  margin-bottom: 20px; }
h2 { margin: 0 0 4px; font-size: 19px; }
section > p { margin: 0 0 14px; color: var(--soft); max-width: 74ch; font-size: 15px; }
figure { margin: 12px 0 0; text-align: center; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 8px 40px;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; margin-top: 8px; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-top: 1px solid var(--line); font-weight: 400;
  vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-size: 13.5px; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: var(--ground); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 13.5px;
  margin: 10px 0 0; }
footer { color: var(--soft); font-size: 13.5px; }
@media (max-width: 560px) { main { padding: 24px 14px 40px; } section { padding: 18px 16px; } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Table:
    """Rows of a table; the first column names the row."""

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part of a report: a sentence, figures with their descriptions, tables, commands."""

    title: str
    text: str = ""
    figures: Sequence[tuple[Figure, str]] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """What `render` writes.

    Attributes:
        title, summary: at the top.
        tiles: (value, what it is), the numbers that matter most.
        sections: in order.
        footer: last line.
    """

    title: str
    summary: str
    tiles: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""


def render(report: Report) -> str:
    """The report as one HTML document; all text is escaped."""
    tiles = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>' for value, what in report.tiles
    )
    sections = "\n".join(_section(section) for section in report.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(report.title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<header><h1>{_text(report.title)}</h1><p>{_text(report.summary)}</p></header>
<div class="tiles">{tiles}</div>
{sections}
<footer>{_text(report.footer)}</footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    parts += [_figure(figure, description) for figure, description in section.figures]
    if section.caption:
        parts.append(f"<figure><figcaption>{_text(section.caption)}</figcaption></figure>")
    if section.tables:
        parts.append(f'<div class="tables">{"".join(_table(table) for table in section.tables)}</div>')
    if section.commands:
        parts.append(f"<pre>{_text(chr(10).join(section.commands))}</pre>")
    return f"<section>{''.join(parts)}</section>"


def _figure(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=192, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(figure.get_figwidth() * 112)
    return f'<figure><img src="data:image/png;base64,{data}" width="{width}" alt="{_text(description)}"></figure>'


def _table(table: Table) -> str:
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return f"<table>{caption}{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{rows}</tbody></table>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
