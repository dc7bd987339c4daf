"""Measure the speed and memory of data preparation: raw rows to arrays, and decoding X-rays.

    python -m data_prep.bench --out=DIR [--copies=200] [--repeats=1] [--mimic_iv=DIR] [--mimic_cxr=DIR]
        [--whole_build] [--json=FILE]

The input is a MIMIC-IV tree (--mimic_iv, for example the demo; by default the synthetic cohort), repeated --copies
times with new ids in `<out>/raw-<copies>`, and again at an eighth of that size. Each measurement has a process of its
own, so that the peak of memory is its own too; it takes turns with `zcat`, --repeats times. --whole_build also measures
the command `data_prep.build` at the larger size: hashes of the tables, labels, checks, shards and the audit.
Prints one JSON line per measurement. On a busy machine compare `cpu_seconds`; `load` is the machine's load average.
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
from data_prep.ehr.arrays import Arrays
from data_prep.images import decode, metadata
from data_prep.raw import tables
from medfuse_jax import records, schema
from medfuse_jax.runtime import command_line, cores
from medfuse_jax.runtime.errors import UserError

IDS = ("subject_id", "hadm_id", "stay_id")
ID_STEP = 100_000_000  # added per copy; larger than every id of MIMIC
MAX_COPIES = 1_000_000
SMALLER_BY = 8  # the factor between the two sizes
MEMBER_BYTES = 64 << 20  # of text in a member of a gzip file
IMAGE_PX = (2544, 3056)
IMAGE_ROUNDS = 5
_MAXRSS_PER_GB = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
LARGE_TABLES = ("chartevents", "labevents")


def repeat(source: dict[str, tables.Table], out: Path, copies: int) -> None:
    """Write each table of `source` as one .csv.gz that holds it `copies` times, each time with new ids."""
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
                    # Concatenated gzip members are one gzip file; PhysioNet's files are compressed at level 6.
                    file.write(gzip.compress(text.getvalue(), 6, mtime=0))
                    text = io.BytesIO()
        partial.rename(target)


def _new_id(name: str, copy: int) -> pl.Expr:
    old = pl.col(name).str.strip_chars().cast(pl.Int64)
    # As in MIMIC, rows are not in order of stay_id, so that neighbouring rows go to many buckets of stays.
    new = old * MAX_COPIES + copy if name == "stay_id" else old + copy * ID_STEP
    return new.cast(pl.String)


def events_to_arrays(root: Path, work: Path, profile: str = "paper") -> dict:
    """Measure the path from the raw tables to phenotyping's arrays at 2 h steps, with the tables in the page cache."""
    raw, rules = tables.mimic_iv(root), profiles.rules(profile)
    num_rows = _count_rows(raw)
    shutil.rmtree(work, ignore_errors=True)
    (work / "events").mkdir(parents=True)
    (work / "arrays").mkdir()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    stays, _ = cohort.read_stays(raw)
    events.extract(raw, stays, rules, work / "events")
    extraction_s = time.perf_counter() - start_s
    discretize.write_arrays(work / "arrays", work / "events", stays, rules, schema.TASKS["pheno"], 2.0)
    costs = {"seconds_extraction": round(extraction_s, 2)} | _costs(num_rows, start_s, start_cpu_s)
    num_stays = len(Arrays.open(work / "arrays").row)
    shutil.rmtree(work)
    return {"what": "events to arrays", "raw_rows": num_rows, "stays": num_stays} | costs


def whole_build(root: Path, work: Path) -> dict:
    """Measure all of `data_prep.build`, including hashes of the tables and the audit, without X-rays."""
    from data_prep import build  # imports TFDS, which the other measurement does not need

    num_rows = _count_rows(tables.mimic_iv(root))
    shutil.rmtree(work, ignore_errors=True)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    build.build(root, None, work)
    costs = _costs(num_rows, start_s, start_cpu_s)
    num_stays = sum(split["records"] for split in records.manifest(work, "pheno")["counts"]["splits"].values())
    shutil.rmtree(work)
    return {"what": "whole build, without X-rays", "raw_rows": num_rows, "stays": num_stays} | costs


def _count_rows(raw: dict[str, tables.Table]) -> int:
    """Count the rows of the large tables, which also loads them into the page cache."""
    counts = [raw[name].scan(raw[name].columns[0]).select(pl.len()) for name in LARGE_TABLES]
    return sum(count.collect(engine="streaming").item() for count in counts)


def _costs(num_rows: int, start_s: float, start_cpu_s: float) -> dict:
    seconds = time.perf_counter() - start_s
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - start_cpu_s, 2),
        "rows_per_s": round(num_rows / seconds),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_PER_GB, 2),
        "cores": cores.usable(),
        "load": round(os.getloadavg()[0], 1),
    }


def zcat(root: Path) -> dict:
    """Measure how long the shell takes to decompress the large tables and count their lines."""
    raw = tables.mimic_iv(root)
    start_s = time.perf_counter()
    for name in LARGE_TABLES:
        subprocess.run(f"zcat '{raw[name].path}' | wc -l", shell=True, check=True, capture_output=True)
    return {"what": "zcat FILE | wc -l", "seconds": round(time.perf_counter() - start_s, 2)}


def images(root: Path, work: Path, limit: int = 24) -> list[dict]:
    """Measure X-rays decoded per second on one core, by our decoder and by PIL's full decode.

    The two take turns; each result is the median of the rounds. Both decode the X-rays as they are, and enlarged to
    IMAGE_PX, the size of MIMIC-CXR's.
    """
    paths = [root / path for path in metadata.read_metadata(tables.mimic_cxr(root))[0]["path"]]
    paths = [path for path in paths if path.is_file()][:limit]
    if not paths:
        raise UserError(f"--mimic_cxr={root} has no X-ray under files/", field="--mimic_cxr", path=root)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    enlarged = [work / path.name for path in paths]
    for path, target in zip(paths, enlarged, strict=True):
        with Image.open(path) as image:
            image.convert("L").resize(IMAGE_PX, Image.Resampling.BICUBIC).save(target, quality=95)
    results = _compare_decoders("as they are", paths)
    results += _compare_decoders("x".join(map(str, IMAGE_PX)) + " px", enlarged)
    shutil.rmtree(work)
    return results


def _compare_decoders(which: str, paths: list[Path]) -> list[dict]:
    size = (schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX)

    def full_decode(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR))

    decoders = {"data_prep": lambda path: decode.decode(path, "squash"), "PIL, full decode": full_decode}
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(IMAGE_ROUNDS):
        for name, decoder in decoders.items():
            decoder(paths[0])
            start_s = time.process_time()
            for path in paths:
                decoder(path)
            rates[name].append(len(paths) / (time.process_time() - start_s))
    return [
        {
            "what": f"X-rays, {which}, {name}",
            "images": len(paths),
            "images_per_s_core": round(statistics.median(rate), 1),
        }
        for name, rate in rates.items()
    ]


def _in_new_process(root: Path, out: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", "data_prep.bench", f"--out={out / 'work'}", f"--one={root}", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _source(mimic_iv: str | None, out: Path) -> dict[str, tables.Table]:
    if mimic_iv:
        return tables.mimic_iv(mimic_iv)
    from data_prep.synthetic import tree

    if not (out / "synthetic" / "mimic-iv").is_dir():
        tree.write(out / "synthetic", num_stays=200, seed=0)
    return tables.mimic_iv(out / "synthetic" / "mimic-iv")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command's flags."""
    flags.DEFINE_string("out", None, "Folder for the input and temporary files.", flag_values=values)
    flags.DEFINE_integer(
        "copies", 200, "Repetitions of the tables at the larger size.", lower_bound=SMALLER_BY, flag_values=values
    )
    flags.DEFINE_integer("repeats", 1, "How often to repeat each measurement.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("mimic_iv", None, "MIMIC-IV tree to repeat; default: the synthetic cohort.", flag_values=values)
    flags.DEFINE_string(
        "mimic_cxr", None, "MIMIC-CXR-JPG tree to decode; default: the synthetic one.", flag_values=values
    )
    flags.DEFINE_bool("whole_build", False, "Also measure all of data_prep.build, without X-rays.", flag_values=values)
    flags.DEFINE_string("json", None, "File to append the measurements to.", flag_values=values)
    flags.DEFINE_string("one", None, "Internal: measure this tree and exit.", flag_values=values)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if not values.out:
        raise UserError("--out=DIR is missing", field="--out")
    os.umask(0o077)  # the repeated tables may be real data
    out = Path(values.out)
    if values.one:
        print(json.dumps((whole_build if values.whole_build else events_to_arrays)(Path(values.one), out)))
        return
    source = _source(values.mimic_iv, out)
    results = []
    for copies in (values.copies // SMALLER_BY, values.copies):
        root = out / f"raw-{copies}"
        if not (root / "complete").exists():
            progress.say(f"writing {root}")
            repeat(source, root, copies)
            (root / "complete").touch()
        for _ in range(values.repeats):
            results += [_in_new_process(root, out) | {"copies": copies}, zcat(root) | {"copies": copies}]
    if values.whole_build:
        results.append(_in_new_process(root, out, "--whole_build") | {"copies": values.copies})
    mimic_cxr = values.mimic_cxr or (None if values.mimic_iv else out / "synthetic" / "mimic-cxr")
    if mimic_cxr:
        results += images(Path(mimic_cxr), out / "images")
    lines = "".join(json.dumps(result) + "\n" for result in results)
    print(lines, end="")
    if values.json:
        with open(values.json, "a") as file:
            file.write(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
