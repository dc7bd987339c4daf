"""Write the audit of a build, `audit.json` and `audit.html`, from the manifests and indexes in its output folder.

Manifests hold exact counts and are as confidential as the shards. The audit is for sharing: aggregates only, no name of
a patient, stay or X-ray, and no count below 10 (privacy.py, medfuse_jax/report/withheld.py). `write` also repeats the
checks (cut-off times, no patient in two splits) on the written files; if one fails, so does the build.
"""

import itertools
from pathlib import Path

from data_prep import cache
from data_prep.audit import page, privacy, published
from data_prep.audit.privacy import share
from data_prep.ehr import events
from data_prep.raw.known_words import OTHER
from data_prep.write.describe import VERSION as FACTS_VERSION
from medfuse_jax import records, schema
from medfuse_jax.report import withheld
from medfuse_jax.report.withheld import cells, part, shown
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def write(out: Path) -> None:
    """Check the datasets and write `<out>/audit.json` and `<out>/audit.html`, unless they are up to date."""
    audit = gather(out)
    text = files.json_text(audit, sort_keys=False, ensure_ascii=False)
    path, page_path = out / "audit.json", out / "audit.html"
    if path.exists() and page_path.exists() and path.read_bytes() == text.encode():
        return
    files.write_text(page_path, page.page(audit))
    files.write_text(path, text)  # last, so that it never exists without the page


def gather(out: Path) -> dict:
    """Return the audit as a dict that JSON can hold."""
    manifests, indexes, not_audited = {}, {}, {}
    for name in schema.TASKS:
        if not (out / name / "manifest.json").exists():
            continue
        try:
            manifest = records.manifest(out, name)
        except UserError as error:
            not_audited[name] = str(error).removeprefix(f"{out}/")
            continue
        if manifest.get("facts_version") != FACTS_VERSION:
            not_audited[name] = "built by another version; build it again"
            continue
        try:
            indexes[name] = {split: records.index(out, name, split) for split in schema.SPLITS}
        except UserError:
            not_audited[name] = "its index is damaged; build it again"
            continue
        manifests[name] = manifest
    return {
        "tasks": {name: _task(name, manifest, indexes[name]) for name, manifest in manifests.items()},
        "patients": _patients(manifests, indexes),
        "not_audited": not_audited,
    }


def _patients(manifests: dict, indexes: dict) -> dict:
    """Count the patients by split over all tasks built from the same tables with the same split rule.

    Within such a group, no patient may be in two splits. Across groups that can happen; `crossings` counts them.
    """
    groups: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        options, tables = manifest["options"], manifest["source"]["mimic_iv_files"]
        rule = cache.key(tables=tables, split=[options[k] for k in ("val_ids", "test_ids", "seed")])
        groups.setdefault(rule, []).append(name)
    counts, ids_of = [], {}
    for names in groups.values():
        ids = {
            split: {subject for name in names for subject in indexes[name][split]["subject_id"].tolist()}
            for split in schema.SPLITS
        }
        in_two = sum(map(len, ids.values())) - len(set().union(*ids.values()))
        if in_two:
            raise AssertionError(f"{in_two} patients of {', '.join(names)} are in two splits")
        by_split = cells({split: len(subjects) for split, subjects in ids.items()})
        counts.append({"tasks": names, "by_split": by_split, "in_two_splits": in_two})
        ids_of[tuple(names)] = ids
    crossings = []
    for (names_a, a), (names_b, b) in itertools.combinations(ids_of.items(), 2):
        crossing = sum(len(a[i] & b[j]) for i, j in itertools.permutations(schema.SPLITS, 2))
        if crossing:
            crossings.append({"between": [list(names_a), list(names_b)], "patients": shown(crossing)})
    return {"groups": counts, "crossings": crossings}


def _task(name: str, manifest: dict, index: dict) -> dict:
    counts, rules, options = manifest["counts"], manifest["rules"], manifest["options"]
    audit = {
        "profile": manifest["profile"],
        "pairing": manifest["pairing"],
        "timestep_h": manifest["timestep_h"],
        "split_by": "given lists" if options["val_ids"] else f"hash of subject_id, seed {options['seed']}",
        "phenotype_table_given": manifest["phenotype_table_given"],
        "source": _source(manifest["source"]),
        "rules": rules,
        "other_words": {
            field: shown(sum(int((fields[field] == OTHER).sum()) for fields in index.values()))
            for field in schema.STATIC_TEXTS
        },
        "splits": _splits(name, index),
    }
    audit["labels"] = _labels(name, manifest["labels"], index, counts, audit["splits"]["ours"])
    if schema.TASKS[name].cxr_only:
        audit["images"] = _images(counts["images"], len(manifest["skipped_images"]))
        return audit
    if "images" in counts:
        audit["blank_images"] = shown(manifest["blank_images"])
        audit["images_missing_or_unreadable"] = shown(len(manifest["skipped_images"]))
    audit["cohort"] = privacy.flow(counts["cohort"])
    for what in ("stays_without_a_diagnosis", "deaths_in_the_window", "deaths_unlike_hospital_expire_flag"):
        if what in counts:
            audit[what] = shown(counts[what])
    audit["unreadable_times"] = {column: shown(n) for column, n in counts["unreadable_times"].items()}
    audit["time_check"] = _time_check(counts["time_check"])
    audit["length_h"] = cells(counts["length_h"])
    audit["variables"] = _variables(counts, index)
    audit["event_rows"] = _event_rows(counts["event_rows"])
    if rules["stored_in_time"]["value"]:
        audit["events_stored_too_late"] = shown(counts["events_stored_too_late"])
        audit["events_stored_at_no_known_time"] = shown(sum(counts["event_rows"].get(events.UNDATED, {}).values()))
    if rules["same_time"]["value"] == "mean":
        audit["duplicate_events"] = shown(counts["duplicate_events"])
    if "diagnosis_codes" in counts:
        audit["diagnosis_codes"] = _codes(counts["diagnosis_codes"])
    return audit


def _source(source: dict) -> dict:
    """Return versions, file names and sizes, without paths."""
    tables = [*source["mimic_iv_files"], *source.get("mimic_cxr_files", [])]
    versions = {name: source[name] for name in ("mimic_iv", "mimic_cxr") if name in source}
    return versions | {"files": [{"file": table["file"], "size_bytes": table["size_bytes"]} for table in tables]}


def _splits(name: str, index: dict) -> dict:
    """Return the numbers of records and paired records by split, beside the published ones."""
    records_shown = cells({split: len(fields["stay_id"]) for split, fields in index.items()})
    rows = {}
    for split, fields in index.items():
        size, paired = len(fields["stay_id"]), int(fields["has_cxr"].sum())
        row = {"records": records_shown[split], "paired": part(paired, size), "paired_share": None}
        if schema.TASKS[name].cxr_only:
            row["paired"] = row["records"]  # every record is an X-ray
        elif isinstance(row["records"], int):
            row["paired_share"] = share(paired, size)
        elif paired >= privacy.SMALLEST:
            row["paired"] = withheld.ENOUGH
        rows[split] = row
    return {
        "ours": rows,
        "published": {what: dict(zip(schema.SPLITS, row)) for what, row in published.COUNTS.get(name, {}).items()},
        "published_paired_test_share": published.PAIRED_TEST_SHARE.get(name),
    }


def _labels(name: str, labels: list[str], index: dict, counts: dict, splits: dict) -> list[dict]:
    """Return each label's positives by split and among the paired test records, beside the paper's.

    splits: the rows of `_splits`; a size hidden there is hidden here too.
    """
    paper = published.PREVALENCE.get(name, {})
    by_time = {}
    for split, predictions in counts.get("predictions", {}).items():
        stays_with = dict(zip(labels, index[split]["label"].sum(0, dtype=int).tolist(), strict=True))
        by_time[split] = _prediction_times(predictions, stays_with, len(index[split]["label"]))
    rows = []
    for k, label in enumerate(labels):
        row = {"label": label}
        for split, fields in index.items():
            positive = fields["label"][:, k] == 1
            row[split] = _prevalence(int(positive.sum()), len(positive), splits[split]["records"])
        if not schema.TASKS[name].cxr_only:
            positive, paired = index["test"]["label"][:, k] == 1, index["test"]["has_cxr"]
            # Test minus paired test gives unpaired test: neither group may have few records with or without the label.
            groups = [p & g for p in (positive, ~positive) for g in (paired, ~paired)]
            few = min(int(group.sum()) for group in groups) < privacy.SMALLEST
            row["paired test"] = _prevalence(
                int((positive & paired).sum()), int(paired.sum()), splits["test"]["paired"], few
            )
        if label in paper:
            row["paper"] = dict(zip(("train", "paired test"), paper[label], strict=True))
        if by_time:
            row["prediction_times"] = {split: cell[label] for split, cell in by_time.items()}
        rows.append(row)
    return rows


def _prediction_times(predictions: dict, stays_with: dict[str, int], num_stays: int) -> dict[str, dict]:
    """Return each label's share of a split's prediction times, hidden if under 10 stays have or lack the label.

    A stay has many times: three deaths give 72 positive hours. stays_with: how many of the split's stays have the
    label at any time. If the labels are mutually exclusive, one count follows from the others.
    """
    positives, times = predictions["positives"], predictions["times"]
    exclusive = len(positives) > 1 and sum(positives.values()) == times
    smaller_side = {label: min(n, num_stays - n) for label, n in stays_with.items()}
    total = times if num_stays >= privacy.SMALLEST else None
    return {
        label: {"positive": n, "of": total, "share": None if n is None or total is None else share(n, times)}
        for label, n in privacy.by_people(positives, smaller_side, exclusive).items()
    }


def _prevalence(positive: int, total: int, total_shown: int | str, hide: bool = False) -> dict:
    """Return the positives among `total` records, hidden if the total is hidden or `hide` is true."""
    positive_shown = part(positive, total)
    if positive >= privacy.SMALLEST and (hide or isinstance(total_shown, str)):
        positive_shown = withheld.ENOUGH
    known = isinstance(positive_shown, int)
    return {"positive": positive_shown, "of": total_shown, "share": share(positive, total) if known else None}


def _images(counts: dict, unreadable: int) -> dict:
    """Return how many X-rays remain after each step, and other counts of X-rays."""
    steps = ("rows of metadata", "X-rays with ids", "X-rays with labels", "X-rays readable")
    flow = privacy.flow([{"filter": step, "stays": counts[step]} for step in steps])
    images = {row["filter"]: row["stays"] for row in flow}
    images |= {what: shown(n) for what, n in counts.items() if isinstance(n, int) and what not in steps}
    return images | {"X-rays that cannot be read": shown(unreadable)}


def _time_check(check: dict) -> dict:
    if check["violations"]:
        raise AssertionError(f"{check['violations']} events or X-rays are later than their cut-off")
    histograms = ("hours_from_latest_event_to_cut_off", "hours_from_cxr_to_cut_off")
    hidden = {"records": shown(check["records"]), "images": shown(check["images"])}
    return check | hidden | {name: cells(check[name]) for name in histograms}


def _variables(counts: dict, index: dict) -> list[dict]:
    """Return each variable's share of observed steps and stays, and its percentiles or classes."""
    stays = counts["time_check"]["records"]
    steps = sum(int(fields["length"].sum()) for fields in index.values())
    rows = []
    for variable in schema.VARIABLES:
        fact = counts["variables"][variable.name]
        few = fact["observed_stays"] < privacy.SMALLEST
        row = {
            "variable": variable.name,
            "unit": variable.unit,
            "stays_observed": part(fact["observed_stays"], stays),
            "steps_observed_share": None if few else share(fact["observed_steps"], steps),
        }
        if variable.classes:
            row["classes"] = privacy.by_people(fact["classes"], fact["class_stays"], known_sum=True)
        else:
            row["percentiles"] = dict.fromkeys(fact["percentiles"]) if few else fact["percentiles"]
        rows.append(row)
    return rows


def _event_rows(event_rows: dict) -> dict:
    """Return how many of each variable's raw rows were kept, and how many were dropped for each reason."""
    result = {}
    for variable in schema.VARIABLES:
        rows = {reason: counts.get(variable.name, 0) for reason, counts in sorted(event_rows.items())}
        clipped, kept = rows.pop(events.CLIPPED, 0), rows.get(events.KEPT, 0)
        rows.pop(events.UNDATED, 0)
        row = cells({reason: n for reason, n in rows.items() if n or reason == events.KEPT})
        hidden = isinstance(row[events.KEPT], str) and clipped >= privacy.SMALLEST
        result[variable.name] = row | {"of the kept, clipped": withheld.ENOUGH if hidden else part(clipped, kept)}
    return result


def _codes(codes: dict) -> dict:
    """Summarise the diagnosis codes that the route to labels does not map."""
    common = [row for row in codes["unmapped"] if row[2] >= privacy.SMALLEST]
    return {
        "route": codes["route"],
        "distinct_codes": {version: shown(n) for version, n in codes["distinct_codes"].items()},
        "rows_of_another_patient": shown(codes["rows_of_another_patient"]),
        "rows_without_a_valid_code": shown(codes["rows_without_a_valid_code"]),
        "stays_without_a_code": shown(codes["stays_without_a_code"]),
        "unmapped": [{"code": code, "version": version, "stays": stays} for code, version, stays in common],
        "unmapped_of_few_stays": shown(len(codes["unmapped"]) - len(common)),
    }
