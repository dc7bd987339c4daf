"""Show what a run's score of one stay rests on: `python -m medfuse_jax.attribution --workdir=DIR --stay=ID`.

The output is one patient's data, readable by its owner alone. See docs/evaluation.md.
"""

import os
from pathlib import Path

from absl import flags

from medfuse_jax.runtime import command_line


def main(argv: list[str]) -> None:
    # Import late, so that a wrong flag is refused before jax starts.
    import numpy as np

    from medfuse_jax import schema
    from medfuse_jax.attribution import page, stay
    from medfuse_jax.runtime import compilation, files

    given = flags.FLAGS
    compilation.configure()
    workdir = Path(given.workdir)
    found = stay.explain(workdir, given.stay, given.label, given.data_dir, given.cxr_features)
    folder = Path(given.out) if given.out else workdir / "attributions"
    os.umask(0o077)  # one patient's data, also while it is being written
    with files.must_write(f"--out={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"stay_{found.stay_id}.html"
        files.write_text(path, page.write(found))
        with files.written_whole(path.with_suffix(".npz")) as unfinished:
            np.savez(
                unfinished,
                channels=np.array(schema.CHANNELS),
                **{name: value for name, value in vars(found).items() if value is not None},
            )
    print(f"{found.label}: {found.score:.3f} in logits, {found.baseline:.3f} with an average series")
    print(f"written, with one patient's data: {path}, {path.with_suffix('.npz')}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
    flags.DEFINE_integer("stay", None, "The stay_id, of any split of the run's shards.", required=True)
    flags.DEFINE_string("label", "", "The label whose score to explain; by default the one with the highest score.")
    flags.DEFINE_string("out", "", "Folder for the page and the arrays; by default attributions/ in the workdir.")
    flags.DEFINE_string("data_dir", "", "New folder of the run's shards, if they were moved; saved in its config.")
    flags.DEFINE_string("cxr_features", "", "New place of the run's precomputed features; saved in its config.")
    command_line.run(main)
