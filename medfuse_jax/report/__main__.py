"""Tables and charts of finished and unfinished runs: `python -m medfuse_jax.report --runs=DIR,DIR --out=DIR`.

Reads workdirs (workdirs.py), writes one self-contained index.html (page.py), and prints the table (text.py).
Nothing here imports jax: reports are made where no accelerator is.
"""

from absl import flags

from medfuse_jax.report import pages
from medfuse_jax.runtime import command_line


def main(argv: list[str]) -> None:
    print(pages.write([folder for folder in flags.FLAGS.runs if folder], flags.FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Workdirs, or folders that hold workdirs, commas between.", required=True)
    flags.DEFINE_string("out", None, "Folder that index.html is written to.", required=True)
    command_line.run(main)
