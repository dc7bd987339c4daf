"""Run commands on disks that are too small for them, then on larger ones, and compare with undisturbed runs.

    PYTHONPATH=.:tests python -m reliability.disks --sizes=10 --dir=DIR [--commands=build,main,report,cache,sweep]

Mounts a tmpfs, which needs root. Prints one line a disk and, as JSON, what came of them: docs/reliability.md.
"""

import argparse
import collections
import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from reliability import signals
from reliability.signals import Attacked

_PAGE = 4096  # bytes that a tmpfs gives a file at least
_ROOM = 2**30  # bytes: enough for every command


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of `size` bytes; raise CalledProcessError where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount(folder, size)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def mount(folder: Path, size: int, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def fill(attacked: Attacked, folder: Path, fractions: list[float], say: Callable = print) -> dict[str, int]:
    """Run a command on disks that hold these fractions of what it writes; free space, rerun and compare; return counts.

    one_line: ended with an error in its last line, and no traceback. fitted: ended with success. Failures are lines
    (another end), and losses (the rerun fails, or makes something else).
    """
    counts = collections.Counter(dict.fromkeys(("one_line", "fitted", "lines", "losses"), 0))
    process = signals.run(attacked, folder / "undisturbed")
    assert process.wait() == 0, (folder / "log").read_text()[-3000:]
    expected = attacked.content(folder / "undisturbed")
    sizes = (path.stat().st_size for path in (folder / "undisturbed").rglob("*") if path.is_file())
    needed = sum(-(-size // _PAGE) * _PAGE for size in sizes)  # a checkpoint has many small files
    for fraction in fractions:
        disk = folder / "disk"
        with mounted(disk, int(needed * fraction)):
            status, text = _end(attacked, disk / "out", folder)
            last = (text.strip().splitlines() or [""])[-1]
            is_one_line = last.startswith("error: ") and not any(t in text for t in ("Traceback", "Exception ignored"))
            outcome = "fitted" if status == 0 else "one_line" if status in (1, 2) and is_one_line else "lines"
            counts[outcome] += 1
            say(f"{attacked.name} on {fraction:.2f} of {needed / 1e6:.1f} MB: {outcome} ({status}): {last[:200]}")
            if outcome == "lines":
                say(text[-3000:])
            mount(disk, _ROOM, "remount")
            status, text = _end(attacked, disk / "out", folder)
            same = status == 0 and attacked.content(disk / "out") == expected
            counts["losses"] += not same
            if not same:
                say(f"{attacked.name}: the rerun ended with {status}, or made something else: {text[-2000:]}")
    return dict(counts)


def _end(attacked: Attacked, out: Path, folder: Path) -> tuple[int, str]:
    process = signals.run(attacked, out, log=folder / "log")
    try:
        return process.wait(600), (folder / "log").read_text()
    finally:
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, default=10)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--commands", default="build,main,report,cache,sweep")
    parser.add_argument("--method", default="medfuse", help="of the run: uni_ehr is the fastest")
    given = parser.parse_args()
    attacked = signals.commands(given.dir, 3, given.method)
    fractions = [(i + 0.5) / given.sizes for i in range(given.sizes)]
    for name in given.commands.split(","):
        counts = fill(attacked[name](), given.dir / f"{name}_disks", fractions)
        print(json.dumps({"command": name, **counts}), flush=True)


if __name__ == "__main__":
    main()
