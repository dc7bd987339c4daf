"""A table as Markdown, CSV, LaTeX, JSON and HTML."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from html import escape

from medfuse_jax.paper.cells import Table, Value
from medfuse_jax.report import html

OUTSIDE = "†"  # marks a number of ours outside the paper's interval
_LATEX = str.maketrans(
    {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "†": r"$^\dagger$", "±": r"$\pm$"}
    | {"<": "$<$", ">": "$>$", "−": "$-$", "→": r"$\to$", "–": "--"}
)


def text(value: Value) -> str:
    """Return a number with its interval, marked if it lies outside the paper's."""
    shown = _number(value.ours, value)
    if not math.isnan(value.low):
        shown += f" ({_number(value.low, value)}, {_number(value.high, value)})"
    if not math.isnan(value.spread):
        shown += f" ± {_number(value.spread, dataclasses.replace(value, is_change=False))}"
    if not math.isnan(value.p):
        shown += f", {_p_text(value)}"
    return shown + (OUTSIDE if value.is_outside else "")


def _p_text(value: Value) -> str:
    return f"p {'< 0.001' if value.p < 0.001 else f'{value.p:.3f}'}"


def paper_text(value: Value) -> str:
    """Return the paper's number with its interval; '' if it gives none."""
    if value.paper is None:
        return ""
    low, high = value.paper.low, value.paper.high
    shown = _number(value.paper.value, value)
    return shown if low is None or high is None else f"{shown} ({_number(low, value)}, {_number(high, value)})"


def _number(x: float, of: Value) -> str:
    if math.isnan(x):
        return "–"
    if of.digits is None:
        return f"{x:.3e}"
    return f"{x:{'+' if of.is_change else ''},.{of.digits}f}".replace("-", "−")


def _lines(cell, between: str) -> str:
    if not isinstance(cell, Value):
        return str(cell)
    paper = paper_text(cell)
    return text(cell) + (f"{between}paper {paper}" if paper else "")


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**", "", _row(table.head), _row(["---"] * len(table.head))]
    lines += [_row(_lines(cell, "<br>") for cell in row) for row in table.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]).rstrip() + "\n"


def _row(cells) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def csv_text(table: Table, notices: list[str]) -> str:
    """Return one column per text and up to eight per number: value, low, high, p, spread, and the paper's three.

    notices: sentences that every table says, in a last column; none, no column.
    """
    fields = ("", "low", "high", "p", "sd", "paper", "paper low", "paper high")
    columns = []  # (column of the table, index into the values, head)
    for c, head in enumerate(table.head):
        values = [_values(row[c]) for row in table.rows]
        columns += [
            (c, i, f"{head} {field}".strip()) for i, field in enumerate(fields) if i == 0 or any(v[i] for v in values)
        ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    said = [" ".join(notices)] if notices else []
    writer.writerow([head for *_, head in columns] + ["notice"] * len(said))
    writer.writerows([[_values(row[c])[i] for c, i, _ in columns] + said for row in table.rows])
    return out.getvalue()


def _values(cell) -> list[str]:
    if not isinstance(cell, Value):
        return [str(cell)] + [""] * 7
    paper = cell.paper or (math.nan,) * 3
    numbers = (cell.ours, cell.low, cell.high, cell.p, cell.spread, *paper)
    return ["" if x is None or math.isnan(x) else f"{x:.6g}" for x in numbers]


def latex(table: Table) -> str:
    """Return a tabular for booktabs, the paper's numbers in a smaller line below ours."""
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"\toprule",
    ]
    lines += [_tex_row(table.head), r"\midrule"]
    for row in table.rows:
        lines.append(_tex_row([text(cell) if isinstance(cell, Value) else cell for cell in row]))
        papers = [paper_text(cell) if isinstance(cell, Value) else "" for cell in row]
        if any(papers):
            lines.append(" & ".join(rf"{{\small {_tex(p)}}}" if p else "" for p in papers) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(rf"\par\small {_tex(note)}" for note in table.notes), r"\end{table}"]
    return "\n".join(lines) + "\n"


def _tex_row(cells) -> str:
    return " & ".join(_tex(str(cell)) for cell in cells) + r" \\"


def _tex(words: str) -> str:
    return words.translate(_LATEX)


def json_object(table: Table) -> dict:
    def cell(of):
        if not isinstance(of, Value):
            return of
        known = {"value": of.ours, "low": of.low, "high": of.high, "p": of.p, "sd": of.spread}
        known = {name: x for name, x in known.items() if not math.isnan(x)}
        if of.paper:
            known |= {"paper": list(of.paper), "outside": of.is_outside}
        return known

    rows = [[cell(x) for x in row] for row in table.rows]
    return {"name": table.name, "title": table.title, "head": table.head, "rows": rows, "notes": table.notes}


def html_table(table: Table, charts: Sequence[tuple[str, str]] = ()) -> str:
    """Return a heading, the charts (caption and SVG of each), the table and its notes.

    On a phone the texts that name a row beside its first cell are below that cell, and not in columns of their own.
    """
    numeric = [any(isinstance(row[c], Value) for row in table.rows) for c in range(len(table.head))]
    num_keys = numeric.index(True) if True in numeric else 1  # columns of texts before the first number
    css = ["num" if is_number else "key" if 0 < c < num_keys else "text" for c, is_number in enumerate(numeric)]
    head = "".join(f'<th scope="col" class="{of}">{_html_text(name)}</th>' for of, name in zip(css, table.head))
    body = "".join(_html_row(row, css, num_keys) for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    drawn = "".join(html.figure(chart, caption) for caption, chart in charts)
    drawn = f'<div class="charts">{drawn}</div>' if drawn else ""
    return f"<h2>{_html_text(table.title)}</h2>{drawn}{html.table(head, body, table.title)}{notes}"


def _html_text(words: str) -> str:
    return escape(words).replace("X-ray", "X\u2011ray")  # which no line may end within


def _html_row(row: list, css: list[str], num_keys: int) -> str:
    keys = " · ".join(filter(None, map(str, row[1:num_keys])))
    below = f'<span class="keys">{escape(keys)}</span>' if keys else ""
    name = f'<th scope="row" class="wrap">{_html_text(str(row[0]))}{below}</th>'
    return f"<tr>{name}{''.join(map(_html_cell, row[1:], css[1:]))}</tr>"


def _html_cell(cell, css: str) -> str:
    """Return one cell. css: the class of its column."""
    if not isinstance(cell, Value):
        return f'<td class="{css} soft">{escape(str(cell))}</td>'
    ours, _, rest = text(dataclasses.replace(cell, p=math.nan)).partition(" ")
    paper, _, bounds = paper_text(cell).partition(" ")
    parts = ["" if math.isnan(cell.p) else _p_text(cell), f"paper {paper}" if paper else "", bounds]
    below = " ".join(f"<span>{escape(part)}</span>" for part in parts if part)
    below = f'<span class="below">{below}</span>' if below else ""
    interval = f' <span class="ci">{escape(rest)}</span>' if rest else ""
    return f'<td class="{css}{" outside" if cell.is_outside else ""}">{escape(ours)}{interval}{below}</td>'
