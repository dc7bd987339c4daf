"""The film step of a build on many processes or machines, as an Apache Beam pipeline (`pip install .[beam]`).

    python -m data_prep.beam_films --mimic_cxr=DIR --out=DIR [--profile=paper] [--workers=N]
        [--runner=DirectRunner|DataflowRunner|FlinkRunner|SparkRunner] [any other option of Beam]

It decodes every film of MIMIC-CXR-JPG that has labels into the cache of `--out`, in the same files and with the same
bytes as `python -m data_prep.build` would; that command, run afterwards with the same --out, --profile and
--mimic_cxr, then finds every film decoded. The workers read and write both folders, so on a cluster these are
on storage that all of them mount. apache-beam wants an older protobuf than TensorFlow Datasets' newest does: where
pip cannot have both, give it an environment of its own, which needs neither jax nor TFDS.
"""

import os
import sys
from pathlib import Path

from absl import flags

from data_prep import cxr, profiles, progress, stages, tables
from medfuse_jax import errors
from medfuse_jax.errors import UserError


def chunk_list(mimic_cxr: Path) -> list[list[tuple[str, str]]]:
    """The chunks that the task 'radiology' asks for: every film with labels."""
    raw = tables.mimic_cxr(mimic_cxr)
    films, _ = cxr.read_films(raw)
    labelled = films.join(cxr.read_labels(raw), on="study_id", maintain_order="left")
    return cxr.chunks(labelled.select("dicom_id", "path").iter_rows())


def decode_chunk(films: list, folder: str, root: str, film_shape: str) -> int:
    """Writes one chunk, for the owner alone; how many of its films could be read."""
    before = os.umask(0o077)
    try:
        path = cxr.write_chunk(Path(folder), Path(root), film_shape, [tuple(film) for film in films])
    finally:
        os.umask(before)
    import numpy as np

    return len(np.load(path, mmap_mode="r"))


def run(mimic_cxr: Path, out: Path, profile: str, beam_options: list[str]) -> None:
    """Runs the pipeline; UserError without apache-beam."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("apache-beam is not installed: pip install '.[beam]'") from None
    film_shape = profiles.rules(profile).film_shape
    chunks = chunk_list(mimic_cxr)
    with stages.private(out) as hidden:
        folder = hidden / "films"
        folder.mkdir(exist_ok=True)
        with beam.Pipeline(options=PipelineOptions(beam_options)) as pipeline:
            _ = (
                pipeline
                | "chunks" >> beam.Create(chunks)
                | "spread" >> beam.Reshuffle()
                | "decode" >> beam.Map(decode_chunk, str(folder), str(mimic_cxr.resolve()), film_shape)
            )
    progress.say(f"{sum(map(len, chunks)):,} films in {len(chunks):,} chunks are in {folder}")


def define_flags() -> None:
    """The command's flags; every other option is Beam's."""
    flags.DEFINE_string("mimic_cxr", None, "The MIMIC-CXR-JPG folder (holds files/).")
    flags.DEFINE_string("out", None, "The output folder of the build.")
    flags.DEFINE_string("profile", "paper", "As for the build: it decides the films' shape.")
    flags.DEFINE_integer("workers", None, "Processes of the DirectRunner; default: the cores.")
    flags.DEFINE_string("runner", "DirectRunner", "Beam's runner.")


def main(argv: list[str]) -> None:
    """The command."""
    values = flags.FLAGS
    for name in ("mimic_cxr", "out"):
        if not getattr(values, name):
            raise UserError(f"--{name}=DIR is missing")
    options = [f"--runner={values.runner}", *BEAM_OPTIONS]
    if values.runner == "DirectRunner":
        workers = values.workers or len(os.sched_getaffinity(0))
        options += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    run(Path(values.mimic_cxr), Path(values.out), values.profile, options)


OURS = ("mimic_cxr", "out", "profile", "workers", "runner", "help")
BEAM_OPTIONS: list[str] = []

if __name__ == "__main__":
    define_flags()
    # absl refuses what it does not know: Beam's own options are taken out before it looks.
    BEAM_OPTIONS += [a for a in sys.argv[1:] if a.lstrip("-").partition("=")[0] not in OURS]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in BEAM_OPTIONS]
    errors.run(main)
