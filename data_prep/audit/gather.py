"""The audit of a build: `audit.json` and `audit.html`, made from the manifests and indexes in the output folder.

Manifests and shards are for the same eyes: both hold exact counts, the first of the second. The audit is what
may be shown to others: aggregates only, no name of a patient, stay or X-ray, no count of 0 to 9 (privacy.py).
The checks (times, patients in one split) are repeated on what is on disk, and a build that fails one fails.
"""

import itertools
import json
from pathlib import Path

from data_prep.audit import privacy, published
from data_prep.audit.privacy import apart, cells, part, share
from data_prep.ehr import events
from data_prep.raw.known_words import OTHER
from data_prep.write.describe import VERSION as FACTS_VERSION
from medfuse_jax import records, schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def write(out: Path) -> None:
    """Checks what is there and writes `<out>/audit.json` and `<out>/audit.html`; leaves what is the same alone."""
    audit = gather(out)
    text = json.dumps(audit, indent=1, ensure_ascii=False) + "\n"
    path, page_path = out / "audit.json", out / "audit.html"
    if path.exists() and page_path.exists() and path.read_bytes() == text.encode():
        return
    from data_prep.audit import page  # imports matplotlib, which takes seconds

    files.write_text(page_path, page.page(audit))
    files.write_text(path, text)  # last: it says that both are there


def gather(out: Path) -> dict:
    """The audit as JSON can hold it."""
    present = [name for name in schema.TASKS if (out / name / "manifest.json").exists()]
    manifests, left_out = {}, {}
    for name in present:
        try:
            manifest = records.manifest(out, name)
        except UserError as error:
            left_out[name] = str(error).removeprefix(f"{out}/")
            continue
        if manifest.get("facts_version") != FACTS_VERSION:
            left_out[name] = "it was built by another version; build it again to see it here"
            continue
        try:
            for split in schema.SPLITS:
                records.index(out, name, split)
        except UserError:
            left_out[name] = "its index is damaged; build it again to see it here"
            continue
        manifests[name] = manifest
    audit = {"tasks": {}, "patients": {}, "not_audited": left_out}
    stays_of: dict[str, set[int]] = {}
    for name, manifest in manifests.items():
        index = {split: records.index(out, name, split) for split in schema.SPLITS}
        found = _task(name, manifest, index)  # its checks run whether it is shown or not
        if not schema.TASKS[name].cxr_only:
            stays = set().union(*(fields["stay_id"].tolist() for fields in index.values()))
            near = next((other for other in stays_of if 0 < len(stays ^ stays_of[other]) < privacy.SMALLEST), None)
            if near:
                left_out[name] = (
                    f"its stays are those of {near} but for fewer than {privacy.SMALLEST}, whom the difference of the "
                    "two would describe; build it into a folder of its own to see it"
                )
                continue
            stays_of[name] = stays
        audit["tasks"][name] = found
    audit["patients"] = _patients(out, manifests, audit["tasks"])
    return audit


def _patients(out: Path, manifests: dict, shown_tasks: dict) -> dict:
    """Patients by split, over all tasks that share tables and a split rule, and that none is in two.

    Between tasks that do not, patients may be in two: `crossings` says of how many.
    """
    groups: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        options, files = manifest["options"], manifest["source"]["mimic_iv_files"]
        rule = json.dumps([files, *(options[k] for k in ("val_ids", "test_ids", "seed"))])
        groups.setdefault(rule, []).append(name)
    found, members_of = [], {}
    for names in groups.values():
        of_task = {
            name: {split: set(records.index(out, name, split)["subject_id"].tolist()) for split in schema.SPLITS}
            for name in names
        }
        members = {split: set().union(*(of_task[name][split] for name in names)) for split in schema.SPLITS}
        in_two = sum(map(len, members.values())) - len(set().union(*members.values()))
        if in_two:
            raise AssertionError(f"{in_two} patients of {', '.join(names)} are in two splits")
        shown = cells({split: len(ids) for split, ids in members.items()})
        for split in (split for split in schema.SPLITS if isinstance(shown[split], int)):
            # Records less patients are those who came back.
            same = [name for name in names if name in shown_tasks and of_task[name][split] == members[split]]
            shown |= apart({split: shown[split]}, [shown_tasks[n]["splits"]["ours"][split]["records"] for n in same])
        found.append({"tasks": names, "by_split": shown, "in_two_splits": in_two})
        members_of[tuple(names)] = members
    crossings = []
    for (some, here), (others, there) in itertools.combinations(members_of.items(), 2):
        crossing = sum(len(here[a] & there[b]) for a, b in itertools.permutations(schema.SPLITS, 2))
        if crossing:
            crossings.append({"between": [list(some), list(others)], "patients": _shown(crossing)})
    return {"groups": found, "crossings": crossings}


def _task(name: str, manifest: dict, index: dict) -> dict:
    counts = manifest["counts"]
    audit = {
        "profile": manifest["profile"],
        "timestep_h": manifest["timestep_h"],
        "split_by": _split_rule(manifest["options"]),
        "phenotype_table_given": manifest["phenotype_table_given"],
        "source": _source(manifest["source"]),
        "rules": manifest["rules"],
        "other_words": _other_words(index),
    }
    left = []
    if "cohort" in counts:
        audit["cohort"] = privacy.flow(counts["cohort"])
        left = [step["stays"] for step in audit["cohort"]]
    audit["splits"] = _splits(name, index, left)
    ours = audit["splits"]["ours"]
    audit["labels"] = _labels(name, manifest["labels"], index, counts, ours)
    if "cohort" in counts:
        audit["unreadable_times"] = {column: _shown(n) for column, n in counts["unreadable_times"].items()}
        audit["time_check"] = _time_check(counts["time_check"], ours, left)
        # What these add up to may be known only where it is no step of the flow that had to be hidden.
        hidden = isinstance(audit["time_check"]["records"], str)
        audit["length_h"] = cells(counts["length_h"], hide_sum=hidden)
        audit["variables"] = _variables(counts, counts["time_check"]["records"], hidden, index)
        audit["event_rows"] = _event_rows(counts["event_rows"])
        if manifest["rules"]["stored_in_time"]["value"]:
            audit["events_stored_too_late"] = _shown(counts["events_stored_too_late"])
            audit["events_stored_at_no_known_time"] = _shown(sum(counts["event_rows"].get(events.UNDATED, {}).values()))
        if manifest["rules"]["same_time"]["value"] == "mean":
            audit["events_given_twice"] = _shown(counts["events_given_twice"])
        if "diagnosis_codes" in counts:
            audit["diagnosis_codes"] = _codes(counts["diagnosis_codes"], left)
    if "images" in counts:
        images = {what: n for what, n in counts["images"].items() if isinstance(n, int)}
        images["X-rays that cannot be read"] = len(manifest["skipped_images"])
        sizes = [len(fields["stay_id"]) for fields in index.values()]
        audit["images"] = apart(images, [sum(sizes)] if schema.TASKS[name].cxr_only else [])
    return audit


def _other_words(index: dict) -> dict:
    """Field -> records whose text was none of the known words (vocabulary.py)."""
    return {
        field: _shown(sum(int((fields[field] == OTHER).sum()) for fields in index.values()))
        for field in records.STATIC_TEXTS
    }


def _split_rule(options: dict) -> str:
    return "given lists" if options["val_ids"] else f"hash of subject_id, seed {options['seed']}"


def _shown(count: int) -> int | str:
    return count if count >= privacy.SMALLEST else privacy.FEW


def _source(source: dict) -> dict:
    """Versions, and the files' names and sizes: no path."""
    files = [*source["mimic_iv_files"], *source.get("mimic_cxr_files", [])]
    versions = {name: source[name] for name in ("mimic_iv", "mimic_cxr") if name in source}
    return versions | {"files": [{"file": f["file"], "size_bytes": f["size_bytes"]} for f in files]}


def _splits(name: str, index: dict, left: list[int | str]) -> dict:
    """Split -> records and paired ones, beside what was published.

    left: the stays that the filters left, as they are shown; the records must not add up to a few less than those.
    """
    sizes = {split: len(fields["stay_id"]) for split, fields in index.items()}
    shown = cells(sizes, hide_sum=isinstance(apart({"records": sum(sizes.values())}, left)["records"], str))
    paired = {split: int(fields["has_cxr"].sum()) for split, fields in index.items()}
    paired_shown = cells(paired)
    result = {}
    for split, size in sizes.items():
        # Of a split, too: neither the paired nor the others may be few.
        few = isinstance(part(paired[split], size), str) and not schema.TASKS[name].cxr_only
        result[split] = {
            "records": shown[split],
            "paired": part(paired[split], size, isinstance(shown[split], int)) if few else paired_shown[split],
            "paired_share": share(paired[split], size)
            if isinstance(paired_shown[split], int) and isinstance(shown[split], int) and not few
            else None,
        }
    return {
        "ours": result,
        "published": {what: dict(zip(schema.SPLITS, row)) for what, row in published.COUNTS.get(name, {}).items()},
        "published_paired_test_share": published.PAIRED_TEST_SHARE.get(name),
    }


def _labels(name: str, labels: list[str], index: dict, counts: dict, splits: dict) -> list[dict]:
    """Each label's positives by split and among the paired test records, beside the paper's.

    splits: what is shown of the splits' sizes (_splits); a total that is hidden there is hidden here.
    """
    paper = published.PREVALENCE.get(name, {})
    rows = []
    times = {}
    for split, predictions in counts.get("predictions", {}).items():
        stays_with = dict(zip(labels, index[split]["label"].sum(0, dtype=int).tolist(), strict=True))
        times[split] = _of_times(predictions, stays_with, len(index[split]["label"]))
    for k, label in enumerate(labels):
        row = {"label": label}
        positives = {split: fields["label"][:, k] == 1 for split, fields in index.items()}
        for split, positive in positives.items():
            row[split] = _prevalence(int(positive.sum()), len(positive), splits[split]["records"])
        test, has_cxr = positives["test"], index["test"]["has_cxr"]
        if not schema.TASKS[name].cxr_only:
            # The unpaired follow from these and the test split's: with or without the label, they must not be few.
            sides = [{"paired": int(t[has_cxr].sum()), "unpaired": int(t[~has_cxr].sum())} for t in (test, ~test)]
            few = any(isinstance(cells(side)["paired"], str) for side in sides)
            row["paired test"] = _prevalence(sides[0]["paired"], int(has_cxr.sum()), splits["test"]["paired"], few)
        if label in paper:
            row["paper"] = dict(zip(("train", "paired test"), paper[label], strict=True))
        if times:
            row["prediction_times"] = {split: shown[label] for split, shown in times.items()}
        rows.append(row)
    return rows


def _of_times(predictions: dict, stays_with: dict[str, int], stays: int) -> dict[str, dict]:
    """Label -> its share of a split's prediction times, where 10 stays or more have the label and as many do not.

    A stay has many times: of one who died, 24 hours are positive, so the times' own number hides nobody.
    stays_with: label -> how many of the split's `stays` have it at any time. Of labels that exclude each other, the
    rest tell one.
    """
    positives, times = predictions["positives"], predictions["times"]
    exclusive = len(positives) > 1 and sum(positives.values()) == times
    shown = privacy.many(positives, {k: min(n, stays - n) for k, n in stays_with.items()}, exclusive)
    total = times if stays >= privacy.SMALLEST else None
    return {
        label: {"positive": n, "of": total, "share": None if n is None or total is None else share(n, times)}
        for label, n in shown.items()
    }


def _prevalence(positive: int, total: int, total_shown: int | str, hide: bool = False) -> dict:
    """total_shown: what the total is shown as. hide: the positives are not to be shown, for other reasons."""
    shown = part(positive, total, isinstance(total_shown, int))
    if hide and isinstance(shown, int):
        shown = privacy.ENOUGH
    known = isinstance(shown, int) and isinstance(total_shown, int)
    return {"positive": shown, "of": total_shown, "share": share(positive, total) if known else None}


def _time_check(check: dict, splits: dict, left: list[int | str]) -> dict:
    """left: the stays that the filters left, as they are shown."""
    if check["violations"]:
        raise AssertionError(f"{check['violations']} events or X-rays are later than their records may see")
    total = apart({"records": check["records"]}, left)["records"]
    event, image = (check[f"hours_from_{what}_to_cut_off"] for what in ("latest_event", "cxr"))
    # The sum of what is hidden by split would give it away, and so would the sum of a histogram.
    known = all(isinstance(row["paired"], int) for row in splits.values())
    return check | {
        "records": total,
        "images": _shown(check["images"]) if known else None,
        "hours_from_latest_event_to_cut_off": cells(event, hide_sum=isinstance(total, str)),
        "hours_from_cxr_to_cut_off": cells(image) if known else None,
    }


def _variables(counts: dict, stays: int, stays_hidden: bool, index: dict) -> list[dict]:
    """What was observed of each variable: in how many steps and stays, its percentiles, what was clipped."""
    steps = sum(int(fields["length"].sum()) for fields in index.values())
    rows = []
    for variable in schema.VARIABLES:
        fact = counts["variables"][variable.name]
        row = {"variable": variable.name, "unit": variable.unit}
        few = fact["observed_stays"] < privacy.SMALLEST
        row["stays_observed"] = part(fact["observed_stays"], stays, not stays_hidden)
        row["steps_observed_share"] = None if few else share(fact["observed_steps"], steps)
        if variable.classes:
            row["classes"] = privacy.many(fact["classes"], fact["class_stays"], known_sum=True)
        else:
            row["percentiles"] = dict.fromkeys(fact["percentiles"]) if few else fact["percentiles"]
        rows.append(row)
    return rows


def _event_rows(event_rows: dict) -> dict:
    """Variable -> what became of its raw rows."""
    result = {}
    for variable in schema.VARIABLES:
        fates = {reason: by_variable.get(variable.name, 0) for reason, by_variable in sorted(event_rows.items())}
        clipped = fates.pop(events.CLIPPED, 0)
        fates.pop(events.UNDATED, 0)
        kept = fates.get(events.KEPT, 0)
        shown = cells({reason: n for reason, n in fates.items() if n or reason == events.KEPT})
        result[variable.name] = shown | {
            "of the kept, clipped": part(clipped, kept, isinstance(shown[events.KEPT], int))
        }
    return result


def _codes(codes: dict, left: list[int | str]) -> dict:
    """The route from codes to labels: what it does not map, and where other routes differ.

    left: the stays that the filters left, as they are shown.
    """
    many = [row for row in codes["unmapped"] if row[2] >= privacy.SMALLEST]
    result = {
        "route": codes["route"],
        "distinct_codes": {version: _shown(n) for version, n in codes["distinct_codes"].items()},
        "rows_of_another_patient": _shown(codes["rows_of_another_patient"]),
        "rows_without_a_valid_code": _shown(codes["rows_without_a_valid_code"]),
        "stays_without_a_code": _shown(codes["stays_without_a_code"]),
        "unmapped": [{"code": c, "version": v, "stays": n} for c, v, n in many],
        "unmapped_of_few_stays": _shown(len(codes["unmapped"]) - len(many)),
        "against": {name: _against(other, left) for name, other in codes["against"].items()},
    }
    totals = [*left, *(other["stays"] for other in result["against"].values())]
    for row in result["unmapped"]:
        row["stays"] = apart({"stays": row["stays"]}, totals)["stays"]
    return result


def _against(other: dict, left: list[int | str]) -> dict:
    """Where one other route gives other labels."""
    stays = other["stays"]
    total = apart({"stays": stays}, left)["stays"]
    known = isinstance(total, int)
    differs = {
        label: [part(other["only_here"][label], stays, known), part(other["only_there"][label], stays, known)]
        for label in other["only_here"]
        if other["only_here"][label] or other["only_there"][label]
    }
    codes = [row for row in other["codes"] if row[2] >= privacy.SMALLEST]
    return {
        "stays_with_all_labels_equal": part(other["stays_with_all_labels_equal"], stays, known),
        "stays": total,
        "labels": differs,
        "codes": [
            {"code": code, "version": version, "stays": part(n, stays, known), "here": here, "there": there}
            for code, version, n, here, there in codes
        ],
        "codes_of_few_stays": _shown(len(other["codes"]) - len(codes)),
    }
