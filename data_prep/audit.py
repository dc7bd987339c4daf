"""The audit of a build: `audit.json` and `audit.html`, made from the manifests and indexes in the output folder.

Manifests and shards are for the same eyes: both hold exact counts, the first of the second. The audit is what
may be shown to others: aggregates only, no name of a patient, stay or film, no count of 0 to 9 (privacy.py).
The checks (times, patients in one split) are repeated on what is on disk, and a build that fails one fails.
"""

import json
from pathlib import Path

from data_prep import privacy, published
from data_prep.describe import VERSION as FACTS_VERSION
from data_prep.privacy import cells, part, share
from medfuse_jax import files, records, tasks
from medfuse_jax.errors import UserError

NO_PEOPLE = 0  # of a check: how many may break it


def write(out: Path) -> None:
    """Checks what is there and writes `<out>/audit.json` and `<out>/audit.html`; leaves what is the same alone."""
    audit = gather(out)
    text = json.dumps(audit, indent=1, ensure_ascii=False) + "\n"
    path, page_path = out / "audit.json", out / "audit.html"
    if path.exists() and page_path.exists() and path.read_bytes() == text.encode():
        return
    from data_prep import audit_page  # imports matplotlib, which takes seconds

    files.write_text(page_path, audit_page.page(audit))
    files.write_text(path, text)  # last: it says that both are there


def gather(out: Path) -> dict:
    """The audit as JSON can hold it."""
    present = [name for name in tasks.TASKS if (out / name / "manifest.json").exists()]
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
        manifests[name] = manifest
    audit = {"tasks": {}, "patients": _patients(out, manifests), "not_audited": left_out}
    stays_of: dict[str, set[int]] = {}
    for name, manifest in manifests.items():
        index = {split: records.index(out, name, split) for split in tasks.SPLITS}
        found = _task(name, manifest, index)  # its checks run whether it is shown or not
        if not tasks.TASKS[name].films_only:
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
    return audit


def _patients(out: Path, manifests: dict) -> dict:
    """Patients by split, over all tasks that share a split rule, and that none is in two."""
    groups: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        rule = json.dumps([manifest["source"], *(manifest["options"][k] for k in ("val_ids", "test_ids", "seed"))])
        groups.setdefault(rule, []).append(name)
    found = []
    for names in groups.values():
        members = {
            split: set().union(*(records.index(out, name, split)["subject_id"].tolist() for name in names))
            for split in tasks.SPLITS
        }
        in_two = sum(map(len, members.values())) - len(set().union(*members.values()))
        if in_two != NO_PEOPLE:
            raise AssertionError(f"{in_two} patients of {', '.join(names)} are in two splits")
        found.append(
            {
                "tasks": names,
                "by_split": cells({split: len(ids) for split, ids in members.items()}),
                "in_two_splits": in_two,
            }
        )
    return {"groups": found}


def _task(name: str, manifest: dict, index: dict) -> dict:
    counts = manifest["counts"]
    audit = {
        "profile": manifest["profile"],
        "timestep_h": manifest["timestep_h"],
        "split_by": _split_rule(manifest["options"]),
        "phenotype_table_given": manifest["phenotype_table_given"],
        "source": _source(manifest["source"]),
        "rules": manifest["rules"],
        "splits": _splits(name, index),
        "labels": _labels(name, manifest["labels"], index, counts),
    }
    if "cohort" in counts:
        audit["cohort"] = privacy.flow(counts["cohort"])
        audit["time_check"] = _time_check(counts["time_check"], audit["splits"]["ours"])
        audit["length_h"] = cells(counts["length_h"])
        audit["variables"] = _variables(counts, sum(counts["length_h"].values()), index)
        audit["event_rows"] = _event_rows(counts["event_rows"])
    if "diagnosis_codes" in counts:
        audit["diagnosis_codes"] = _codes(counts["diagnosis_codes"])
    if "films" in counts:
        audit["films"] = {what: _shown(n) for what, n in counts["films"].items() if isinstance(n, int)}
        audit["films"]["films that cannot be read"] = _shown(len(manifest["skipped_films"]))
    return audit


def _split_rule(options: dict) -> str:
    return "given lists" if options["val_ids"] else f"hash of subject_id, seed {options['seed']}"


def _shown(count: int) -> int | str:
    return count if count >= privacy.SMALLEST else privacy.FEW


def _source(source: dict) -> dict:
    """Versions, and the files' names and sizes: no path."""
    files = [*source["mimic_iv_files"], *source.get("mimic_cxr_files", [])]
    versions = {name: source[name] for name in ("mimic_iv", "mimic_cxr") if name in source}
    return versions | {"files": [{"file": f["file"], "size_bytes": f["size_bytes"]} for f in files]}


def _splits(name: str, index: dict) -> dict:
    """Split -> records and paired ones, beside what was published."""
    sizes = {split: len(fields["stay_id"]) for split, fields in index.items()}
    shown = cells(sizes)
    paired = {split: int(fields["has_cxr"].sum()) for split, fields in index.items()}
    paired_shown = cells(paired)
    result = {}
    for split, size in sizes.items():
        # Of a split, too: neither the paired nor the others may be few.
        few = isinstance(part(paired[split], size), str)
        result[split] = {
            "records": shown[split],
            "paired": part(paired[split], size) if few else paired_shown[split],
            "paired_share": share(paired[split], size) if isinstance(paired_shown[split], int) and not few else None,
        }
    return {
        "ours": result,
        "published": {what: dict(zip(tasks.SPLITS, row)) for what, row in published.COUNTS.get(name, {}).items()},
        "published_paired_test_share": published.PAIRED_TEST_SHARE.get(name),
    }


def _labels(name: str, labels: list[str], index: dict, counts: dict) -> list[dict]:
    """Each label's positives by split and among the paired test records, beside the paper's."""
    paper = published.PREVALENCE.get(name, {})
    rows = []
    for k, label in enumerate(labels):
        row = {"label": label}
        positives = {split: fields["label"][:, k] == 1 for split, fields in index.items()}
        for split, positive in positives.items():
            row[split] = _prevalence(int(positive.sum()), len(positive))
        test, has_cxr = positives["test"], index["test"]["has_cxr"]
        if not tasks.TASKS[name].films_only:
            apart = cells({"paired": int(test[has_cxr].sum()), "unpaired": int(test[~has_cxr].sum())})
            row["paired test"] = _prevalence(int(test[has_cxr].sum()), int(has_cxr.sum()), apart["paired"])
        if label in paper:
            row["paper"] = dict(zip(("train", "paired test"), paper[label], strict=True))
        if "predictions" in counts:
            row["prediction_times"] = {
                split: _prevalence(n["positives"][label], n["times"]) for split, n in counts["predictions"].items()
            }
        rows.append(row)
    return rows


def _prevalence(positive: int, total: int, shown: int | str = "") -> dict:
    """shown: what a count may be shown as for other reasons, '' for none."""
    inside = part(positive, total)
    shown = inside if isinstance(inside, str) or shown == "" else shown
    return {"positive": shown, "of": _shown(total), "share": share(positive, total) if isinstance(shown, int) else None}


def _time_check(check: dict, splits: dict) -> dict:
    if check["violations"] != NO_PEOPLE:
        raise AssertionError(f"{check['violations']} events or films are later than their records may see")
    margins = {name: cells(check[name]) for name in check if name.startswith("hours_from")}
    # The sum of what is hidden by split would give it away.
    films = _shown(check["films"]) if all(isinstance(row["paired"], int) for row in splits.values()) else None
    return check | margins | {"records": _shown(check["records"]), "films": films}


def _variables(counts: dict, stays: int, index: dict) -> list[dict]:
    """What was observed of each variable: in how many steps and stays, its percentiles, what was clipped."""
    steps = sum(int(fields["length"].sum()) for fields in index.values())
    rows = []
    for variable in tasks.VARIABLES:
        fact = counts["variables"][variable.name]
        row = {"variable": variable.name, "unit": variable.unit}
        few = fact["observed_stays"] < privacy.SMALLEST
        row["stays_observed"] = part(fact["observed_stays"], stays)
        row["steps_observed_share"] = None if few or not steps else round(fact["observed_steps"] / steps, 4)
        if variable.classes:
            row["classes"] = cells(fact["classes"])
        else:
            row["percentiles"] = dict.fromkeys(fact["percentiles"]) if few else fact["percentiles"]
        rows.append(row)
    return rows


def _event_rows(event_rows: dict) -> dict:
    """Variable -> what became of its raw rows."""
    result = {}
    for variable in tasks.VARIABLES:
        fates = {reason: by_variable.get(variable.name, 0) for reason, by_variable in sorted(event_rows.items())}
        clipped = fates.pop("clipped (and kept)", 0)
        kept = fates.get("kept", 0)
        shown = cells({reason: n for reason, n in fates.items() if n or reason == "kept"})
        result[variable.name] = shown | {"of the kept, clipped": part(clipped, kept) if clipped else 0}
    return result


def _codes(codes: dict) -> dict:
    """The route from codes to labels: what it does not map, and where other routes differ."""
    many = [row for row in codes["unmapped"] if row[2] >= privacy.SMALLEST]
    result = {
        "route": codes["route"],
        "distinct_codes": {version: _shown(n) for version, n in codes["distinct_codes"].items()},
        "stays_without_a_code": _shown(codes["stays_without_a_code"]),
        "unmapped": [{"code": c, "version": v, "stays": n} for c, v, n in many],
        "unmapped_of_few_stays": _shown(len(codes["unmapped"]) - len(many)),
        "against": {},
    }
    for name, other in codes["against"].items():
        stays = other["stays"]
        differs = {
            label: [part(other["only_here"][label], stays), part(other["only_there"][label], stays)]
            for label in other["only_here"]
            if other["only_here"][label] or other["only_there"][label]
        }
        shown_codes = [row for row in other["codes"] if row[2] >= privacy.SMALLEST]
        result["against"][name] = {
            "stays_with_all_labels_equal": part(other["stays_with_all_labels_equal"], stays),
            "stays": stays,
            "labels": differs,
            "codes": [dict(zip(("code", "version", "stays", "here", "there"), row)) for row in shown_codes],
            "codes_of_few_stays": _shown(len(other["codes"]) - len(shown_codes)),
        }
    return result
