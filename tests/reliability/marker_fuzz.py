"""Put a marker into fields of raw tables, whole or damaged, and look for it in all that a build prints and writes.

    PYTHONPATH=.:tests python -m reliability.marker_fuzz --cases=300

A marker in a name of an X-ray (`dicom_id`) may be in records, manifests and the cache. No other may be anywhere: not in
what is printed or raised, the audit, manifests, the cache or the records, and so not in what is made of them.
--only=NUMBER repeats one case.
"""

import argparse
import contextlib
import csv
import gzip
import io
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import build_cases

from data_prep import build
from medfuse_jax.runtime.errors import UserError

MARKER = "MARKER"
_FORMS = (MARKER, f"{MARKER} Smith", f"{MARKER}1000", f"1000{MARKER}", f'"{MARKER}', f"\ufeff{MARKER}", f"../{MARKER}")


def mark(root: Path, rng: random.Random) -> str:
    """Put the marker into a part of the cells of some columns of one table; perhaps damage it; return what was done."""
    path = rng.choice(sorted(root.rglob("*.csv.gz")))
    header, *rows = csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))
    columns = rng.sample(range(len(header)), rng.choice((1, 1, 2, len(header))))
    share, form = rng.choice((0.005, 0.3, 1)), rng.choice(_FORMS)
    for row in rows:
        for column in columns:
            if rng.random() < share:
                row[column] = form
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    lines = text.getvalue().splitlines(keepends=True)
    what = f"{form!r} in {path.name}, columns {', '.join(header[c] for c in columns)}, {share:.1%} of the rows"
    damage = rng.choice(("", "", "no header", "open quote", "other separator", "cut", "cut gzip"))
    if damage == "no header":
        lines = lines[1:]
    elif damage == "open quote":
        line = rng.randrange(len(lines))
        lines[line] = '"' + lines[line]
    elif damage == "other separator":
        lines = [line.replace(",", ";") for line in lines]
    elif damage == "cut":
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
    content = gzip.compress("".join(lines).encode())
    path.write_bytes(content[: len(content) * 2 // 3] if damage == "cut gzip" else content)
    return f"{what}; {damage or 'whole'}"


def leaks(whole: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    """Build from a marked copy of the tree in `whole`; return (what was marked, where the marker is)."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder / "raw")
    what = mark(folder / "raw", rng)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            build.build(folder / "raw" / "iv", folder / "raw" / "cxr", folder / "out")
        except UserError as error:
            print(f"error: {error}")
        except Exception:
            print(f"{MARKER}: not one line: {traceback.format_exc()}")
    found = [f"printed: {line}" for line in printed.getvalue().splitlines() if MARKER in line]
    for path in (folder / "out").rglob("*"):
        if path.is_file() and MARKER.encode() in path.read_bytes() and not _is_allowed(path, what):
            found.append(str(path.relative_to(folder / "out")))
    return what, found


def _is_allowed(path: Path, what: str) -> bool:
    is_of_records = ".array_record" in path.name or path.name == "manifest.json" or ".cache" in path.parts
    return "dicom_id" in what and is_of_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, help="number of the one case to run")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        build_cases.write_tree(Path(name) / "whole")
        for number in range(given.cases) if given.only < 0 else [given.only]:
            rng = random.Random(f"{given.seed} {number}")
            what, found = leaks(Path(name) / "whole", Path(name) / "marked", rng)
            if found:
                failed += 1
                print(f"case {number}: {what}\n  " + "\n  ".join(found), flush=True)
    print(f"{failed} failures of {given.cases if given.only < 0 else 1}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
