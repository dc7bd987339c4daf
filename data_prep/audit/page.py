"""The audit as one self-contained HTML page, without scripts or dates: the same build always gives the same page."""

from html import escape

from data_prep import profiles
from data_prep.audit import plots, privacy
from data_prep.ehr import events
from medfuse_jax import schema
from medfuse_jax.report import html, withheld

CSS = """
h2 { margin: 3.5rem 0 0.5rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
h3 { margin-top: 2.25rem; }
.checks { list-style: none; margin: 1.5rem 0 0; padding: 0; max-width: 46rem; }
.checks li { padding: 0.6rem 0 0.6rem 1.9rem; border-top: 1px solid var(--rule); position: relative; }
.checks li:last-child { border-bottom: 1px solid var(--rule); }
.checks li::before { content: "✓"; position: absolute; left: 0.3rem; color: var(--run2); font-weight: 700; }
.checks small { color: var(--muted); font-size: 0.8125rem; display: block; }

table { min-width: min(100%, 34rem); }
th, td { padding: 0.35rem 0.6rem; text-align: right; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tbody th { white-space: normal; min-width: 9rem; max-width: 22rem; }
td.text, th.text { text-align: left; white-space: normal; min-width: 11rem; }
td.short, th.short { text-align: left; }
td.bar { width: 40%; min-width: 7rem; }
td.bar div { background: var(--run0); height: 0.65rem; border-radius: 2px; min-width: 2px; }
.ours { color: var(--run0); } .papers { color: var(--run1); }
.charts { margin-top: 2rem; }
.chart { margin-top: 1rem; }
.chart + .scroll { margin-top: 1.5rem; }
.chart text { fill: var(--ink); font-size: 11px; }
.chart text.soft { fill: var(--muted); font-size: 10px; }
.chart .grid, .chart .link { stroke: var(--rule); fill: none; }
.chart .link { stroke-width: 2.5; }
.chart .bar, .chart .dot { fill: var(--run0); }
.chart .ring { fill: none; stroke: var(--run1); stroke-width: 1.6; }
details { margin-top: 1.25rem; font-size: 0.9375rem; }
details > summary { color: var(--muted); padding: 0.25rem 0; }
details[open] > summary { margin-bottom: 0.5rem; }
footer { max-width: 46rem; }
@media (max-width: 40rem) {
  th, td { padding: 0.35rem 0.25rem; }
  tbody th { max-width: 44vw; min-width: 7rem; }
  td.bar { display: none; }
  td .soft { display: block; font-size: 0.6875rem; }
}
"""
_COUNTS = {
    "stays_without_a_diagnosis": "Stays without a diagnosis",
    "deaths_in_the_window": "stays whose patient dies before the end of the window",
    "deaths_unlike_hospital_expire_flag": "labels of death that hospital_expire_flag contradicts",
    "blank_images": "X-rays of one grey everywhere",
    "images_missing_or_unreadable": "X-rays missing or unreadable",
}
_ROUTES = {  # docs/phenotypes.md has more
    "gem": "gem (ICD-10-CM to ICD-9-CM by the General Equivalence Mappings, then CCS)",
    "table": "table (the file given as --phenotypes)",
}


def page(audit: dict) -> str:
    """Return the whole document. audit: as from gather.gather."""
    parts = [_header(audit), _checks(audit)]
    for name, content in audit["tasks"].items():
        parts.append(f'<section id="{name}"><h2>{_title(name)}</h2>{_task(name, content)}</section>')
    parts += [_events(audit), _sources(audit), _footer()]
    return html.document("Data audit", "".join(parts), CSS)


def number(value) -> str:
    """Format a count, a share or None as HTML; escape a text such as '<10'."""
    if value is None:
        return '<span class="soft">–</span>'
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"


def percent(value: float | None) -> str:
    return number(None) if value is None else f"{100 * value:.1f}%"


def table(head: list[str], rows: list[list[str]], classes: dict[int, str] | None = None) -> str:
    """Return a table of HTML cells; the first cell of a row is its heading. classes: column -> CSS class."""

    def cell(tag: str, i: int, content: str) -> str:
        css_class = (classes or {}).get(i)
        return f'<{tag} class="{css_class}">{content}</{tag}>' if css_class else f"<{tag}>{content}</{tag}>"

    top = "".join(cell("th", i, content) for i, content in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(cell("td", i, c) for i, c in enumerate(row[1:], start=1))}</tr>'
        for row in rows
    )
    return f'<div class="scroll" tabindex=0><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _title(name: str) -> str:
    return escape(schema.TASKS[name].title)


def _titles(names: list[str]) -> str:
    return ", ".join(_title(name).lower() for name in names)


def _header(audit: dict) -> str:
    sizes = []
    for name, content in audit["tasks"].items():
        records = [row["records"] for row in content["splits"]["ours"].values()]
        known = all(isinstance(n, int) for n in records)
        sizes.append(f"{_title(name).lower()} ({sum(records):,})" if known else _title(name).lower())
    lead = f'<p class="lead">Records of this build: {", ".join(sizes)}.</p>' if sizes else ""
    facts = ""
    if audit["tasks"]:
        source = next(iter(audit["tasks"].values()))["source"]
        titles = {"mimic_iv": "MIMIC-IV", "mimic_cxr": "MIMIC-CXR-JPG"}
        values = {
            "Source": " and ".join(f"{title} {source[key]}" for key, title in titles.items() if key in source),
            "Profile": _by_task(audit, "profile"),
            "Time step": _by_task(audit, "timestep_h") + " h",
            "Split by": _by_task(audit, "split_by"),
            "X-rays paired": _by_task(audit, "pairing"),
        }
        facts = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
    reasons = "".join(f"<li>{_title(name)}: {escape(why)}</li>" for name, why in audit["not_audited"].items())
    notice = f'<div class="notice"><strong>Not in this audit:</strong><ul>{reasons}</ul></div>' if reasons else ""
    marked = [name for name, content in audit["tasks"].items() if content["pairing"] == profiles.UNTIL_OUTTIME]
    if marked:
        why = escape(profiles.PAIRING[profiles.UNTIL_OUTTIME])
        notice += f'<div class="notice"><strong>{_titles(marked)}, for comparison alone:</strong> {why}</div>'
    notice += "".join(_crossing(crossing) for crossing in audit["patients"]["crossings"])
    return f'<header><h1>Data audit</h1>{lead}{notice}<dl class="facts">{facts}</dl></header>'


def _crossing(crossing: dict) -> str:
    a, b = (_titles(names) for names in crossing["between"])
    return (
        f'<div class="notice"><strong>Patients in two splits:</strong> {number(crossing["patients"])} are in one split '
        f"of {a} and in another of {b}, which were built from different tables or split by different rules. Do not "
        "train on one and test on the other.</div>"
    )


def _by_task(audit: dict, field: str) -> str:
    """Return the field's value: once if all tasks agree, otherwise once per task."""
    values = {name: content[field] for name, content in audit["tasks"].items()}
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({schema.TASKS[name].title.lower()})" for name, text in texts.items())


def _checks(audit: dict) -> str:
    items = []
    for name, content in audit["tasks"].items():
        if check := content.get("time_check"):
            items.append(
                f"{_title(name)}: nothing is later than its cut-off<small>Compared with each record's cut-off "
                f"({escape(check['cut_off'])}): the latest event of {number(check['records'])} records, the times of "
                f"{number(check['images'])} X-rays; {check['violations']} violations</small>"
            )
    for group in audit["patients"]["groups"]:
        sizes = ", ".join(f"{split} {number(n)}" for split, n in group["by_split"].items())
        items.append(
            f"No patient is in two splits<small>Patients of {_titles(group['tasks'])}: {sizes}; in more than one: "
            f"{group['in_two_splits']}</small>"
        )
    return f'<ul class="checks">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _task(name: str, content: dict) -> str:
    parts = [
        _flow(content["cohort"]) if "cohort" in content else "",
        _counts(content),
        _splits(content["splits"], schema.TASKS[name].cxr_only),
        _warning("Records with an unknown word, read as OTHER", content["other_words"]),
        _warning("Unreadable times, read as missing", content.get("unreadable_times", {})),
        _labels(name, content["labels"]),
        _variables(content) if "variables" in content else "",
        _codes(content["diagnosis_codes"]) if "diagnosis_codes" in content else "",
    ]
    if "images" in content:
        rows = [[escape(what), number(n)] for what, n in content["images"].items()]
        parts.append("<h3>X-rays</h3>" + table(["", "X-rays"], rows))
    return "".join(parts)


def _flow(steps: list[dict]) -> str:
    largest = max((step["stays"] for step in steps if isinstance(step["stays"], int)), default=1)
    rows = []
    for step in steps:
        width = 100 * step["stays"] / largest if isinstance(step["stays"], int) else 1
        bar = f'<div style="width:{width:.1f}%"></div>'
        rows.append([escape(step["filter"]), number(step["stays"]), number(step["removed"] or None), bar])
    note = "A filter that removed 1 to 9 stays is merged with its neighbours."
    content = table(["", "stays left", "removed", ""], rows, {3: "bar"})
    return f'<h3>Filters</h3>{content}<p class="note">{note}</p>'


def _splits(splits: dict, cxr_only: bool) -> str:
    ours = splits["ours"]
    rows = [["Records", *(number(row["records"]) for row in ours.values())]]
    if not cxr_only:
        rows.append(["With an X-ray", *(number(row["paired"]) for row in ours.values())])
        rows.append(["Share with an X-ray", *(percent(row["paired_share"]) for row in ours.values())])
    for what, counts in splits["published"].items():
        kind, _, source = what.partition(", ")
        title = {"records": "Records", "paired": "With an X-ray"}[kind]
        rows.append([f'<span class="papers">{title}, {escape(source)}</span>', *(number(counts[s]) for s in ours)])
    if splits["published_paired_test_share"]:
        share = percent(splits["published_paired_test_share"])
        rows.append(['<span class="papers">Share with an X-ray, paper</span>', number(None), number(None), share])
    return f"<h3>Splits</h3>{table(['', *ours], rows)}"


def _counts(content: dict) -> str:
    """Return a note of the counts in _COUNTS that the task has."""
    notes = [f"{what}: {number(content[name])}" for name, what in _COUNTS.items() if name in content]
    return f'<p class="note">{"; ".join(notes)}.</p>' if notes else ""


def _warning(what: str, counts: dict) -> str:
    """Return a note of the counts of 10 or more, which are too many to be typing errors; '' if there are none."""
    large = ", ".join(f"{field} {number(n)}" for field, n in counts.items() if n != withheld.FEW)
    return f'<p class="note">{what}: {large}.</p>' if large else ""


def _labels(name: str, labels: list[dict]) -> str:
    has_paper = any("paper" in row for row in labels)
    columns = [c for c in ("train", "val", "test", "paired test") if c in labels[0]]
    head = ["", *columns]
    if has_paper:
        head += ['<span class="papers">paper, train</span>', '<span class="papers">paper, paired test</span>']
    rows = []
    for row in labels:
        cells = [escape(row["label"]), *(_prevalence(row[c]) for c in columns)]
        if has_paper:
            cells += [percent(row.get("paper", {}).get(c)) for c in ("train", "paired test")]
        rows.append(cells)
    content = table(head, rows)
    title = "Prevalence"
    if schema.TASKS[name].hourly:
        title += ": stays with the label at any hour"
        by_time = [
            [escape(r["label"]), *(_prevalence(r["prediction_times"][s]) for s in schema.SPLITS)] for r in labels
        ]
        content += f"<h3>Prevalence: prediction times</h3>{table(['', *schema.SPLITS], by_time)}"
        content += '<p class="note">Shown if at least 10 stays of the split have the label and at least 10 do not.</p>'
    chart = ""
    if has_paper and len(labels) > 1:
        svg = plots.prevalence(
            [row["label"] for row in labels],
            [row["train"]["share"] for row in labels],
            [row["paper"]["train"] for row in labels],
        )
        key = '<span class="ours">● this build</span> &nbsp; <span class="papers">○ the paper</span>'
        chart = f'<figure class="chart"><figcaption>{key}</figcaption>{svg}</figure>'
    return f"<h3>{title}</h3>{chart}{content}"


def _prevalence(cell: dict) -> str:
    if cell["share"] is not None:
        return f'{percent(cell["share"])} <span class="soft">({number(cell["positive"])})</span>'
    return number(cell["positive"])


def _variables(content: dict) -> str:
    variables, check = content["variables"], content["time_check"]
    rows = []
    for row in variables:
        percentiles = row.get("percentiles", {})
        unit = row["unit"] or (f"{len(row['classes'])} classes" if "classes" in row else "")
        clipped = content["event_rows"][row["variable"]]["of the kept, clipped"]
        rows.append(
            [
                escape(row["variable"]),
                escape(unit),
                *(number(percentiles.get(q)) for q in ("1", "5", "50", "95", "99")),
                number(row["stays_observed"]),
                percent(row["steps_observed_share"]),
                number(clipped),
            ]
        )
    head = ["", "unit", "1%", "5%", "median", "95%", "99%", "stays observed", "steps observed", "rows clipped"]
    names, shares = [row["variable"] for row in variables], [row["steps_observed_share"] for row in variables]
    charts = {
        "How often each variable is observed": plots.observed(names, shares),
        "Length of the records": plots.histogram(content["length_h"], "stays", "hours"),
        "From the latest event to the cut-off": plots.histogram(
            check["hours_from_latest_event_to_cut_off"], "stays", "hours"
        ),
    }
    if check["images"] != withheld.FEW:
        image_hours = check["hours_from_cxr_to_cut_off"]
        charts["From the X-ray to the cut-off"] = plots.histogram(image_hours, "X-rays", "hours")
    figures = "".join(html.figure(svg, caption) for caption, svg in charts.items())
    note = "Percentiles are over the steps with an observation; one is shown if at least 10 lie on each side of it."
    if "duplicate_events" in content:
        note += f" Duplicate events, counted once: {number(content['duplicate_events'])}."
    if "events_stored_too_late" in content:
        note += f" Events dropped because they were stored too late: {number(content['events_stored_too_late'])};"
        note += f" kept without a storetime: {number(content['events_stored_at_no_known_time'])}."
    variables_table = table(head, rows, {1: "short"})
    return f'<div class="charts">{figures}</div><h3>Variables</h3>{variables_table}<p class="note">{note}</p>'


def _codes(codes: dict) -> str:
    distinct = ", ".join(f"{number(n)} {version}" for version, n in codes["distinct_codes"].items())
    text = (
        f"Labels are derived from codes by the route {_ROUTES[codes['route']]}. Distinct codes: {distinct or 'none'}. "
        f"Stays without a code: {number(codes['stays_without_a_code'])}. "
        f"Rows with an invalid code: {number(codes['rows_without_a_valid_code'])}."
    )
    rows = [[escape(r["code"]), f"ICD-{r['version']}", number(r["stays"])] for r in codes["unmapped"]]
    unmapped = table(["code without a category", "version", "stays"], rows) if rows else ""
    few = number(codes["unmapped_of_few_stays"])
    note = f'<p class="note">Codes without a category in fewer than 10 stays: {few}.</p>'
    return f"<h3>Diagnosis codes</h3><p>{text}</p>{unmapped}{note}"


def _events(audit: dict) -> str:
    """Return the section on raw rows kept and dropped, which are the same for all tasks of a build."""
    content = next((c for c in audit["tasks"].values() if "event_rows" in c), None)
    if content is None:
        return ""
    event_rows = content["event_rows"]
    columns = list(dict.fromkeys(column for row in event_rows.values() for column in row))
    columns.sort(key=lambda column: (column != events.KEPT, column != "of the kept, clipped"))
    rows = [[escape(name), *(number(row.get(column)) for column in columns)] for name, row in event_rows.items()]
    return f"<section><h2>Raw rows kept and dropped</h2>{table(['', *map(escape, columns)], rows)}</section>"


def _sources(audit: dict) -> str:
    content = next(iter(audit["tasks"].values()), None)
    if content is None:
        return ""
    rules = [
        [f"<code>{escape(n)}</code>", escape(str(r["value"])), escape(r["why"])] for n, r in content["rules"].items()
    ]
    tables = [[escape(f["file"]), number(f["size_bytes"])] for f in content["source"]["files"]]
    given = content["phenotype_table_given"]
    phenotypes = f"{'with' if given else 'without'} a phenotype table."
    if content["profile"] == "released" and not given:
        phenotypes = "without the released phenotype table, so its phenotype labels are not the released ones."
    rules_table = table(["rule", "value", "why"], rules, {1: "short", 2: "text"})
    return (
        f"<section><h2>Rules and sources</h2><p>Profile {escape(content['profile'])}, {phenotypes}</p>"
        f"<details><summary>The profile's rules</summary>{rules_table}</details>"
        f"<details><summary>Source files</summary>{table(['file', 'bytes'], tables)}</details></section>"
    )


def _footer() -> str:
    few, enough = escape(withheld.FEW), withheld.ENOUGH
    return (
        f"<footer>Counts below {privacy.SMALLEST} are shown as {few}. If the rest of a table would reveal such a "
        f"count, a neighbouring one is shown as {enough}. Several tables or tasks together may reveal "
        "more: check that before you share this page. No patient, stay or X-ray is named. The paper is Hayat et al. "
        "2022 (MedFuse), on MIMIC-IV 1.0 and MIMIC-CXR 2.0.0: its Table 4 and Figure 1.</footer>"
    )
