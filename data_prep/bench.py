"""How fast and how large: raw rows to discretised arrays, and X-rays, on input that this command makes itself.

    python -m data_prep.bench --out=DIR [--copies=200] [--repeats=1] [--mimic_iv=DIR] [--mimic_cxr=DIR]
        [--whole_build] [--json=FILE]

The input is a MIMIC-IV tree (--mimic_iv, for example the demo; without it the synthetic cohort) repeated
--copies times with new ids, in `<out>/raw-<copies>`, and one an eighth as large. Each measurement is a process of its
own, so that its peak memory is its own; --repeats of them take turns with `zcat`. --whole_build measures the command
`data_prep.build` too, at the larger size: hashes of the tables, labels, checks, shards and audit are in that alone.
Prints one line of JSON a measurement. On a machine that does other things too, `cpu_seconds` and `load` say how far to
trust `seconds`.
"""

import gzip
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
from absl import flags
from PIL import Image

from data_prep import profiles, progress
from data_prep.ehr import cohort, discretize, events
from data_prep.images import store as image_store
from data_prep.raw import tables
from medfuse_jax import records, schema
from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import UserError

IDS = ("subject_id", "hadm_id", "stay_id")
ID_STEP = 100_000_000  # added a copy: above every id of MIMIC
MOST_COPIES = 1_000_000
SMALLER = 8
MEMBER_BYTES = 64 << 20
IMAGE_PX = (2544, 3056)
IMAGE_ROUNDS = 5


def repeat(source: dict[str, tables.Table], out: Path, copies: int) -> None:
    """Writes the tables of `source` `copies` times, each time with other ids, as one .csv.gz a table."""
    for table in source.values():
        target = out / f"{table.name.removesuffix('.gz')}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        frame = pl.read_csv(table.path, infer_schema=False)
        partial = target.with_suffix(".partial")
        with open(partial, "wb") as file:
            text = io.BytesIO()
            for copy in range(copies):
                shifted = frame.with_columns(_new_id(name, copy) for name in IDS if name in frame.columns)
                shifted.write_csv(text, include_header=copy == 0, quote_style="necessary")
                if text.tell() > MEMBER_BYTES or copy == copies - 1:
                    # Members one after the other are one gzip file; level 6 is what PhysioNet's files have.
                    file.write(gzip.compress(text.getvalue(), 6, mtime=0))
                    text = io.BytesIO()
        partial.rename(target)


def _new_id(name: str, copy: int) -> pl.Expr:
    old = pl.col(name).str.strip_chars().cast(pl.Int64)
    # As in MIMIC, the order of stay_id is not that of the rows, so that rows of one place go to every bucket of stays.
    new = old * MOST_COPIES + copy if name == "stay_id" else old + copy * ID_STEP
    return new.cast(pl.String)


def events_to_arrays(root: Path, work: Path, profile: str = "paper") -> dict:
    """Times the path from the raw tables to phenotyping's arrays of 2 h steps; the tables are read once before."""
    raw = tables.mimic_iv(root)
    rows = _raw_rows(raw)
    shutil.rmtree(work, ignore_errors=True)
    (work / "events").mkdir(parents=True)
    (work / "arrays").mkdir()
    start, cpu_before_s = time.perf_counter(), time.process_time()
    stays, _ = cohort.read_stays(raw)
    events.extract(raw, stays, profiles.rules(profile), work / "events")
    extracted = time.perf_counter()
    rules = profiles.rules(profile)
    discretize.write_arrays(work / "arrays", work / "events", stays, rules, schema.TASKS["pheno"], 2.0)
    end, cpu_s = time.perf_counter(), time.process_time() - cpu_before_s
    stays_made = len(discretize.Arrays.open(work / "arrays").row)
    shutil.rmtree(work)
    return {
        "what": "events to arrays",
        "raw_rows": rows,
        "stays": stays_made,
        "seconds": round(end - start, 2),
        "seconds_extraction": round(extracted - start, 2),
    } | _costs(rows, end - start, cpu_s)


def whole_build(root: Path, work: Path) -> dict:
    """Times what a user runs: the whole of `data_prep.build`, tables hashed and audit written, without X-rays."""
    from data_prep import build  # imports TFDS and what the other measurement does without

    rows = _raw_rows(tables.mimic_iv(root))
    shutil.rmtree(work, ignore_errors=True)
    start, cpu_before_s = time.perf_counter(), time.process_time()
    build.build(root, None, work)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_before_s
    stays = sum(split["records"] for split in records.manifest(work, "pheno")["counts"]["splits"].values())
    shutil.rmtree(work)
    facts = {"what": "whole build, without X-rays", "raw_rows": rows, "stays": stays, "seconds": round(seconds, 2)}
    return facts | _costs(rows, seconds, cpu_s)


def _raw_rows(raw: dict[str, tables.Table]) -> int:
    """Also brings the tables into the cache."""
    return sum(raw[name].scan(raw[name].columns[0]).select(pl.len()).collect(engine="streaming").item() for name in BIG)


def _costs(rows: int, seconds: float, cpu_s: float) -> dict:
    return {
        "cpu_seconds": round(cpu_s, 2),
        "rows_per_s": round(rows / seconds),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


BIG = ("chartevents", "labevents")


def zcat(root: Path) -> dict:
    """How long the shell needs to unpack and count the same files."""
    raw = tables.mimic_iv(root)
    start = time.perf_counter()
    for name in BIG:
        subprocess.run(f"zcat '{raw[name].path}' | wc -l", shell=True, check=True, capture_output=True)
    return {"what": "zcat FILE | wc -l", "seconds": round(time.perf_counter() - start, 2)}


def images(root: Path, work: Path, most: int = 24) -> list[dict]:
    """X-rays a second on one core, the median of rounds in turns: ours, and PIL decoding the whole X-ray first.

    On the X-rays as they are, and enlarged to IMAGE_PX, the size of MIMIC-CXR's own.
    """
    raw = tables.mimic_cxr(root)
    paths = [root / path for path in image_store.read_metadata(raw)[0]["path"] if (root / path).is_file()][:most]
    if not paths:
        raise UserError(f"--mimic_cxr={root} holds no X-ray under files/")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    enlarged = [work / path.name for path in paths]
    for path, target in zip(paths, enlarged, strict=True):
        with Image.open(path) as image:
            image.convert("L").resize(IMAGE_PX, Image.Resampling.BICUBIC).save(target, quality=95)
    results = _decode_both("as they are", paths) + _decode_both("x".join(map(str, IMAGE_PX)) + " px", enlarged)
    shutil.rmtree(work)
    return results


def _decode_both(which: str, paths: list[Path]) -> list[dict]:
    size = (schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX)

    def whole(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR))

    decoders = {"data_prep": lambda path: image_store.decode(path, "squash"), "PIL, whole X-ray": whole}
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(IMAGE_ROUNDS):
        for name, decode in decoders.items():
            decode(paths[0])
            start = time.process_time()
            for path in paths:
                decode(path)
            rates[name].append(len(paths) / (time.process_time() - start))
    return [
        {
            "what": f"X-rays, {which}, {name}",
            "images": len(paths),
            "images_per_s_core": round(statistics.median(found), 1),
        }
        for name, found in rates.items()
    ]


def _source(mimic_iv: str | None, out: Path) -> dict[str, tables.Table]:
    if mimic_iv:
        return tables.mimic_iv(mimic_iv)
    from data_prep.synthetic import tree

    if not (out / "synthetic" / "mimic-iv").is_dir():
        tree.write(out / "synthetic", num_stays=200, seed=0)
    return tables.mimic_iv(out / "synthetic" / "mimic-iv")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "Where the input it makes and its work go.")
    flags.DEFINE_integer("copies", 200, "How often the tables are repeated, at the larger size.", lower_bound=SMALLER)
    flags.DEFINE_integer("repeats", 1, "How often each is measured, in turns.", lower_bound=1)
    flags.DEFINE_string("mimic_iv", None, "The MIMIC-IV tree to repeat; default: the synthetic cohort.")
    flags.DEFINE_string("mimic_cxr", None, "A MIMIC-CXR-JPG tree to decode X-rays of; default: the synthetic one.")
    flags.DEFINE_bool("whole_build", False, "Also measure the whole of data_prep.build, without X-rays.")
    flags.DEFINE_string("json", None, "A file to append the measurements to.")
    flags.DEFINE_string("one", None, "Of use to the command itself: measure one tree and end.")


def main(argv: list[str]) -> None:
    """The command."""
    values = flags.FLAGS
    if not values.out:
        raise UserError("--out=DIR is missing")
    os.umask(0o077)  # what it repeats may be the real thing
    out = Path(values.out)
    if values.one:
        print(json.dumps((whole_build if values.whole_build else events_to_arrays)(Path(values.one), out)))
        return
    source = _source(values.mimic_iv, out)
    results = []
    for copies in (values.copies // SMALLER, values.copies):
        root = out / f"raw-{copies}"
        if not (root / "whole").exists():
            progress.say(f"making {root}")
            repeat(source, root, copies)
            (root / "whole").touch()
        command = [sys.executable, "-m", "data_prep.bench", f"--out={out / 'work'}", f"--one={root}"]
        for _ in range(values.repeats):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results += [json.loads(done.stdout) | {"copies": copies}, zcat(root) | {"copies": copies}]
    if values.whole_build:
        done = subprocess.run([*command, "--whole_build"], stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout) | {"copies": values.copies})
    images_of = values.mimic_cxr or (None if values.mimic_iv else out / "synthetic" / "mimic-cxr")
    if images_of:
        results += images(Path(images_of), out / "images")
    lines = "".join(json.dumps(result) + "\n" for result in results)
    print(lines, end="")
    if values.json:
        with open(values.json, "a") as file:
            file.write(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
