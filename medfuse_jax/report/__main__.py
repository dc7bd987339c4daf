"""Report on finished and unfinished runs: `python -m medfuse_jax.report --runs=DIR,DIR --out=DIR`.

Reads workdirs (read_runs.py), writes one self-contained index.html (pages.py) and prints a table (terminal.py).
Never imports jax, so that reports can be made on a machine without it.
"""

from absl import flags

from medfuse_jax.report import pages
from medfuse_jax.runtime import command_line


def main(argv: list[str]) -> None:
    print(pages.write([folder for folder in flags.FLAGS.runs if folder], flags.FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Workdirs or folders that hold workdirs, comma-separated.", required=True)
    flags.DEFINE_string("out", None, "Folder to write index.html to.", required=True)
    command_line.run(main)
