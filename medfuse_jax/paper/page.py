"""The results as files: one page with every table and figure, and each table in four formats."""

import datetime
from html import escape
from pathlib import Path

from medfuse_jax.paper import figures, formats
from medfuse_jax.paper.cells import Table
from medfuse_jax.paper.contents import Check
from medfuse_jax.report import html, style
from medfuse_jax.runtime import files

_CSS = (
    style.CSS
    + """
main { max-width: 78rem; }
thead th { white-space: normal; }
tbody th, td { vertical-align: top; }
thead th:first-child, tbody th[scope="row"] { position: sticky; left: 0; background: var(--paper); z-index: 1; }
td.num { white-space: nowrap; }
.below { display: block; color: var(--muted); font-size: 0.75rem; }
.below span { white-space: nowrap; }
.keys { display: none; color: var(--muted); font-size: 0.6875rem; }
.outside { font-weight: 650; }
.outside .ci, .outside .below { font-weight: 400; }
nav { font-size: 0.875rem; margin: 0 0 1.5rem; }
nav a { margin-right: 0.9rem; color: inherit; white-space: nowrap; }
.charts { margin: 1rem 0 1.5rem; }
@media (max-width: 40rem) {
  .below { white-space: normal; max-width: 7rem; margin-left: auto; font-size: 0.6875rem; }
  tbody .wrap { min-width: 7.5rem; }
  .key { display: none; }
  .keys { display: block; }
}
"""
)


def write(
    out: Path, tables: list[Table], checks: list[Check], facts: dict, notices: list[str], synthetic: bool
) -> Path:
    """Write index.html, paper.json, and tables/<name>.md, .csv and .tex; return the page's path.

    facts: name -> text, shown at the top. notices: sentences that every table says.
    """
    folder = out / "tables"
    with files.must_write(f"--out={out}"):
        folder.mkdir(parents=True, exist_ok=True)
        for table in tables:
            table.notes += notices
            files.write_text(folder / f"{table.name}.md", formats.markdown(table))
            files.write_text(folder / f"{table.name}.csv", formats.csv_text(table, notices))
            files.write_text(folder / f"{table.name}.tex", formats.latex(table))
        failed = [check for check in checks if not check.holds]
        content = {
            "facts": facts,
            "notices": notices,
            "synthetic": synthetic,
            "tables": [formats.json_object(table) for table in tables],
            "self_checks": {"made": len(checks), "failed": [vars(check) for check in failed]},
        }
        files.write_json(out / "paper.json", content)
        files.write_text(out / "index.html", _page(tables, failed, facts, notices, synthetic))
    return out / "index.html"


def _page(tables: list[Table], failed: list[Check], facts: dict, notices: list[str], synthetic: bool) -> str:
    title = "MedFuse: the paper's tables"
    links = " ".join(f'<a href="#{t.name}">{escape(t.title.partition(".")[0])}</a>' for t in tables)
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    wrong = "".join(f"<li>{escape(c.what)}: {c.a:.6f} and {c.b:.6f}</li>" for c in failed)
    parts = [
        f"<header><h1>{title}</h1>",
        '<p class="lead">Our numbers, each with the paper’s (Hayat et al. 2022) below it. A number marked '
        f"{formats.OUTSIDE} lies outside the paper’s 95 % interval.</p>",
        html.synthetic_notice(int(synthetic), 1),
        f'<div class="notice"><strong>These should be equal.</strong><ul>{wrong}</ul></div>' if failed else "",
        "".join(f'<p class="notice">{escape(notice)}</p>' for notice in notices),
        f'<dl class="facts">{shown}</dl><nav>{links}</nav></header>',
    ]
    for table in tables:
        parts.append(f'<section id="{table.name}">{formats.html_table(table, figures.charts(table))}</section>')
    now = datetime.datetime.now().astimezone()
    parts.append(f"<footer>Written by medfuse_jax.paper on {now:%-d %B %Y at %H:%M %Z}.</footer>")
    return html.document(title, "".join(parts), _CSS)
