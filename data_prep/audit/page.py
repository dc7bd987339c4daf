"""The audit as one HTML page: nothing loaded from elsewhere, no script, and no date, so that a build gives it again."""

from html import escape

from data_prep.audit import plots, privacy, style
from medfuse_jax import schema
from medfuse_jax.report import html

_ROUTES = {  # docs/phenotypes.md has more
    "gem": "ICD-10-CM to ICD-9-CM by the General Equivalence Mappings, then CCS",
    "gem, last row": "as gem, but of several equivalents the last listed one alone",
    "HCUP CCS": "HCUP's own CCS for ICD-10-CM",
    "table": "the file given as --phenotypes",
}


def page(audit: dict) -> str:
    """The whole document, of what audit.gather gives."""
    parts = [_header(audit), _checks(audit)]
    for name, content in audit["tasks"].items():
        parts.append(f'<section id="{name}"><h2>{schema.TASKS[name].title}</h2>{_task(name, content, audit)}</section>')
    parts += [_events(audit), _sources(audit), _footer()]
    return html.document("Data audit", "".join(parts), style.CSS)


def number(value) -> str:
    """A count, a share or None as text."""
    if value is None:
        return '<span class="soft">–</span>'
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"


def percent(value: float | None) -> str:
    return number(None) if value is None else f"{100 * value:.1f}%"


def table(head: list[str], rows: list[list[str]], text_columns: tuple[int, ...] = ()) -> str:
    """A table; the first cell of a row is its heading. Cells are HTML."""

    def attributes(i: int) -> str:
        return ' class="text"' if i in text_columns else ""

    top = "".join(f"<th{attributes(i)}>{cell}</th>" for i, cell in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            cell if cell.startswith("<td") else f"<td{attributes(i)}>{cell}</td>"
            for i, cell in enumerate(row[1:], start=1)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll" tabindex=0><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _header(audit: dict) -> str:
    lines = []
    for name, content in audit["tasks"].items():
        records = [row["records"] for row in content["splits"]["ours"].values()]
        known = all(isinstance(n, int) for n in records)
        title = schema.TASKS[name].title.lower()
        lines.append(f"{title} ({sum(records):,})" if known else title)
    first = next(iter(audit["tasks"].values()), None)
    lead = f'<p class="lead">What the build made, and from what: {escape(", ".join(lines))}.</p>' if lines else ""
    facts = ""
    if first:
        versions = [
            f"{title} {first['source'][key]}"
            for key, title in (("mimic_iv", "MIMIC-IV"), ("mimic_cxr", "MIMIC-CXR-JPG"))
            if key in first["source"]
        ]
        shown = {
            "Source": " and ".join(versions),
            "Profile": _one_of(audit, "profile"),
            "Step": _one_of(audit, "timestep_h") + " h",
            "Split by": _one_of(audit, "split_by"),
        }
        facts = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in shown.items())
    left_out = "".join(
        f"<li>{escape(schema.TASKS[n].title)}: {escape(why)}</li>" for n, why in audit["not_audited"].items()
    )
    notice = f'<div class="notice"><strong>Not in this audit:</strong><ul>{left_out}</ul></div>' if left_out else ""
    notice += "".join(_crossing(found) for found in audit["patients"]["crossings"])
    return f'<header><h1>Data audit</h1>{lead}{notice}<dl class="facts">{facts}</dl></header>'


def _crossing(found: dict) -> str:
    here, there = (", ".join(schema.TASKS[name].title.lower() for name in names) for names in found["between"])
    return (
        f'<div class="notice"><strong>Patients in two splits:</strong> {number(found["patients"])} are in one split of '
        f"{escape(here)} and in another of {escape(there)}, which were built from other tables or by another split "
        "rule: do not train on one and test on the other.</div>"
    )


def _images(count: int | str | None) -> str:
    return "their X-rays" if count is None else f"{number(count)} X-rays"


def _one_of(audit: dict, field: str) -> str:
    """A field that most often is the same for all tasks."""
    values = {name: content[field] for name, content in audit["tasks"].items()}
    text = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    if len(set(text.values())) == 1:
        return next(iter(text.values()))
    return ", ".join(f"{value} ({schema.TASKS[name].title.lower()})" for name, value in text.items())


def _checks(audit: dict) -> str:
    items = []
    for name, content in audit["tasks"].items():
        if check := content.get("time_check"):
            items.append(
                f"{schema.TASKS[name].title}: nothing is later than its record may see<small>The latest event of "
                f"{number(check['records'])} records and the time of {_images(check['images'])}, each against its "
                f"own cut-off ({escape(check['cut_off'])}): {check['violations']} violations</small>"
            )
    for group in audit["patients"]["groups"]:
        sizes = ", ".join(f"{split} {number(n)}" for split, n in group["by_split"].items())
        named = ", ".join(schema.TASKS[name].title.lower() for name in group["tasks"])
        items.append(
            f"No patient is in two splits<small>Over {escape(named)}: patients in {sizes}; in more than one: "
            f"{group['in_two_splits']}</small>"
        )
    return f'<ul class="checks">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _task(name: str, content: dict, audit: dict) -> str:
    parts = [
        _flow(content["cohort"]) if "cohort" in content else "",
        _splits(content["splits"], schema.TASKS[name].cxr_only),
        _many("Records whose text was no known word and became OTHER", content["other_words"]),
        _many("Times that cannot be read, each no death or no admission", content.get("unreadable_times", {})),
    ]
    parts.append(_labels(name, content["labels"]))
    if "variables" in content:
        parts.append(_variables(content))
    if "diagnosis_codes" in content:
        parts.append(_codes(content))
    if "images" in content and schema.TASKS[name].cxr_only:
        rows = [[escape(what), number(n)] for what, n in content["images"].items()]
        parts.append("<h3>X-rays</h3>" + table(["", "images"], rows))
    return "".join(parts)


def _flow(steps: list[dict]) -> str:
    most = max((s["stays"] for s in steps if isinstance(s["stays"], int)), default=1)
    rows = []
    for step in steps:
        width = 100 * step["stays"] / most if isinstance(step["stays"], int) else 1
        bar = f'<td class="bar"><div style="width:{width:.1f}%"></div></td>'
        rows.append([escape(step["filter"]), number(step["stays"]), number(step["removed"] or None), bar])
    note = "A filter that removed 1 to 9 stays is shown together with its neighbour."
    return f'<h3>Which stays</h3>{table(["", "stays left", "removed", ""], rows)}<p class="note">{note}</p>'


def _splits(splits: dict, cxr_only: bool) -> str:
    ours, rows = splits["ours"], []
    head = ["", *ours]
    rows.append(["Records", *(number(row["records"]) for row in ours.values())])
    if not cxr_only:
        rows.append(["With an X-ray", *(number(row["paired"]) for row in ours.values())])
        rows.append(["Share with an X-ray", *(percent(row["paired_share"]) for row in ours.values())])
    for what, counts in splits["published"].items():
        first, _, source = what.partition(", ")
        title = {"records": "Records", "paired": "With an X-ray"}[first]
        rows.append([f'<span class="papers">{title}, {escape(source)}</span>', *(number(counts[s]) for s in ours)])
    if splits["published_paired_test_share"]:
        share = percent(splits["published_paired_test_share"])
        rows.append(['<span class="papers">Share with an X-ray, paper</span>', number(None), number(None), share])
    return f"<h3>Splits and pairs</h3>{table(head, rows)}"


def _many(what: str, counts: dict) -> str:
    """Said only where there are as many that it is no slip: new words, other forms."""
    many = ", ".join(f"{field} {number(n)}" for field, n in counts.items() if n != privacy.FEW)
    return f'<p class="note">{what}: {many}.</p>' if many else ""


def _labels(name: str, labels: list[dict]) -> str:
    paper = any("paper" in row for row in labels)
    columns = [c for c in ("train", "val", "test", "paired test") if c in labels[0]]
    head = ["", *columns]
    if paper:
        head += ['<span class="papers">paper, train</span>', '<span class="papers">paper, paired test</span>']
    rows = []
    for row in labels:
        cells = [escape(row["label"]), *(_prevalence(row[c]) for c in columns)]
        if paper:
            cells += [percent(row.get("paper", {}).get(c)) for c in ("train", "paired test")]
        rows.append(cells)
    content = table(head, rows)
    title = "Share of positives"
    if schema.TASKS[name].per_step:
        title += ", at any hour of the stay"
        timed = [[escape(r["label"]), *(_prevalence(r["prediction_times"][s]) for s in schema.SPLITS)] for r in labels]
        content += f"<h3>Share of positives, of all prediction times</h3>{table(['', *schema.SPLITS], timed)}"
        content += '<p class="note">Where at least 10 stays of the split have the label, and at least 10 do not.</p>'
    chart = ""
    if paper and len(labels) > 1:
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
    rows = []
    for row in content["variables"]:
        p = row.get("percentiles", {})
        unit = row["unit"] or (f"{len(row['classes'])} classes" if "classes" in row else "")
        fates = content["event_rows"][row["variable"]]
        rows.append(
            [
                escape(row["variable"]),
                f'<td class="text">{escape(unit)}</td>',
                *(number(p.get(q)) for q in ("1", "5", "50", "95", "99")),
                number(row["stays_observed"]),
                percent(row["steps_observed_share"]),
                number(fates["of the kept, clipped"]),
            ]
        )
    head = ["", '<span style="float:left">unit</span>', "1 %", "5 %", "median", "95 %", "99 %"]
    head += ["stays observed", "steps observed", "rows clipped"]
    charts = [
        (
            "How often each variable was observed",
            plots.observed(
                [r["variable"] for r in content["variables"]], [r["steps_observed_share"] for r in content["variables"]]
            ),
        ),
        ("How long the records are", plots.bars(content["length_h"], "stays", "hours")),
    ]
    check = content["time_check"]
    event, image = check["hours_from_latest_event_to_cut_off"], check["hours_from_cxr_to_cut_off"]
    charts.append(("From the latest event to the cut-off", plots.bars(event, "stays", "hours")))
    if image is not None and check["images"] != privacy.FEW:
        charts.append(("From the X-ray to the cut-off", plots.bars(image, "images", "hours")))
    figures = "".join(f'<figure class="chart"><figcaption>{t}</figcaption>{svg}</figure>' for t, svg in charts)
    note = "Percentiles of the observed steps, where at least 10 lie on either side."
    if "events_given_twice" in content:
        note += f" Events given twice, which count once: {number(content['events_given_twice'])}."
    if "events_stored_too_late" in content:
        note += f" Events left out because they were stored too late: {number(content['events_stored_too_late'])};"
        note += f" kept though nothing says when they were: {number(content['events_stored_at_no_known_time'])}."
    return f'<div class="charts">{figures}</div><h3>Variables</h3>{table(head, rows)}<p class="note">{note}</p>'


def _codes(content: dict) -> str:
    codes = content["diagnosis_codes"]
    found = ", ".join(f"{number(n)} {version}" for version, n in codes["distinct_codes"].items())
    text = (
        f"From code to label by the route {_route(codes['route'])}. {found} codes; "
        f"{number(codes['stays_without_a_code'])} stays without a code; "
        f"{number(codes['rows_without_a_valid_code'])} rows whose code cannot be one."
    )
    few = number(codes["unmapped_of_few_stays"])
    rows = [[escape(r["code"]), f"ICD-{r['version']}", number(r["stays"])] for r in codes["unmapped"]]
    unmapped = table(["code without a category", "version", "stays"], rows) if rows else ""
    unmapped += f'<p class="note">Codes without a category that fewer than 10 stays have: {few}.</p>'
    parts = [f"<h3>Diagnosis codes</h3><p>{text}</p>{unmapped}"]
    for name, other in codes["against"].items():
        equal = f"{number(other['stays_with_all_labels_equal'])} of {number(other['stays'])}"
        labels = [[escape(label), number(a), number(b)] for label, (a, b) in other["labels"].items()]
        many = [
            [escape(r["code"]), f"ICD-{r['version']}", number(r["stays"]), _ids(r["here"]), _ids(r["there"])]
            for r in other["codes"]
        ]
        inner = (
            table(["label", f"only by {escape(codes['route'])}", f"only by {escape(name)}"], labels) if labels else ""
        )
        if many:
            inner += "<p></p>" + table(["code", "version", "stays", "CCS here", f"CCS by {escape(name)}"], many)
        inner += f'<p class="note">Differing codes of fewer than 10 stays: {number(other["codes_of_few_stays"])}.</p>'
        parts.append(
            f"<details><summary>Against the route {_route(name)}: {equal} stays have all labels equal</summary>"
            f"{inner}</details>"
        )
    return "".join(parts)


def _route(name: str) -> str:
    return f"{escape(name)} ({_ROUTES[name]})" if name in _ROUTES else escape(name)


def _ids(categories: list[int]) -> str:
    return ", ".join(map(str, categories)) or number(None)


def _events(audit: dict) -> str:
    """What became of the raw rows; the same for all tasks of a build, so once."""
    content = next((c for c in audit["tasks"].values() if "event_rows" in c), None)
    if content is None:
        return ""
    fates = list(dict.fromkeys(fate for row in content["event_rows"].values() for fate in row))
    fates.sort(key=lambda fate: (fate != "kept", fate != "of the kept, clipped"))
    rows = [
        [escape(variable), *(number(row.get(fate)) for fate in fates)]
        for variable, row in content["event_rows"].items()
    ]
    return f"<section><h2>What became of the raw rows</h2>{table(['', *map(escape, fates)], rows)}</section>"


def _sources(audit: dict) -> str:
    content = next(iter(audit["tasks"].values()), None)
    if content is None:
        return ""
    rules = [
        [f"<code>{escape(n)}</code>", escape(str(r["value"])), escape(r["why"])] for n, r in content["rules"].items()
    ]
    files = [[escape(f["file"]), number(f["size_bytes"])] for f in content["source"]["files"]]
    if content["profile"] == "released" and not content["phenotype_table_given"]:
        given = "without the released phenotype table: its phenotype labels are not the released ones."
    else:
        given = "with a phenotype table." if content["phenotype_table_given"] else "without a phenotype table."
    return (
        f"<section><h2>How it was made</h2><p>Profile {escape(content['profile'])}, {given}</p>"
        f"<details><summary>The profile's rules</summary>{table(['rule', 'value', 'why'], rules, (1, 2))}</details>"
        f"<details><summary>The source's files</summary>{table(['file', 'bytes'], files)}</details></section>"
    )


def _footer() -> str:
    return (
        f"<footer>Counts below {privacy.SMALLEST} are shown as {escape(privacy.FEW)}. Where one of them could be had "
        f"by subtraction, the next smallest of its group is hidden as {privacy.ENOUGH}. This does not hold between "
        "tables of two tasks, which share stays: give one task's away. No patient, stay or X-ray is "
        "named. The paper is Hayat et al. 2022 (MedFuse), on MIMIC-IV 1.0 and MIMIC-CXR 2.0.0: its Table 4 and "
        "Figure 1.</footer>"
    )
