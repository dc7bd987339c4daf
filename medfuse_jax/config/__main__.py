"""Print the table of all config fields, or write it into docs/config.md: `--write=docs/config.md`."""

import re
from pathlib import Path

from absl import flags

from medfuse_jax import config
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

_TABLE = re.compile(r"^\| field \|.*\n(?:\|.*\n)*", re.MULTILINE)


def write(path: Path) -> None:
    """Replace the table in a page; raise UserError if the page has none."""
    with files.must_write(f"--write={path}"):
        page, num_tables = _TABLE.subn(lambda _: config.table() + "\n", path.read_text(encoding="utf-8"))
        if num_tables != 1:
            raise UserError(f"--write={path}: the page must have one table of fields", field="--write", path=path)
        files.write_text(path, page)


def main(argv: list[str]) -> None:
    if flags.FLAGS.write:
        write(Path(flags.FLAGS.write))
    else:
        print(config.table())


if __name__ == "__main__":
    flags.DEFINE_string("write", "", "Page to write the table into, such as docs/config.md.")
    command_line.run(main)
