"""The X-ray step of a build on many processes or machines, as an Apache Beam pipeline (`pip install .[beam]`).

    python -m data_prep.images.beam --mimic_cxr=DIR --out=DIR [--profile=paper] [--workers=N]
        [--runner=DirectRunner|DataflowRunner|FlinkRunner|SparkRunner] [any other option of Beam]

It decodes every X-ray of MIMIC-CXR-JPG that has labels into the cache of `--out`, in the same files and with the same
bytes as `python -m data_prep.build` would; that command, run afterwards with the same --out, --profile and
--mimic_cxr, then finds every X-ray decoded, whatever its tasks. Both are folders and no addresses (gs://, s3://): on a
cluster every worker must have mounted them at the same path. apache-beam wants an older protobuf than TensorFlow
Datasets' newest does: where pip cannot have both, give it an environment of its own, which needs neither jax nor TFDS
but the build's version of Pillow (what another one decoded is decoded again).
"""

import difflib
import os
from pathlib import Path

import numpy as np
from absl import flags

from data_prep import cache, profiles, progress
from data_prep.images import store as image_store
from data_prep.raw import tables
from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import UserError

OURS = ("mimic_cxr", "out", "profile", "workers", "runner")


def chunk_list(mimic_cxr: Path) -> list[list[tuple[str, str]]]:
    """The chunks that the task 'radiology' asks for: every X-ray with labels."""
    raw = tables.mimic_cxr(mimic_cxr)
    images, _ = image_store.read_metadata(raw)
    labelled = images.join(image_store.read_labels(raw), on="study_id", maintain_order="left")
    return image_store.chunks(labelled.select("dicom_id", "path").iter_rows())


def decode_chunk(images: list, folder: str, root: str, image_shape: str) -> int:
    """Writes one chunk, for the owner alone; how many of its X-rays could be read."""
    before = os.umask(0o077)
    try:
        path = image_store.write_chunk(Path(folder), Path(root), image_shape, [tuple(image) for image in images])
    finally:
        os.umask(before)
    return len(np.load(path, mmap_mode="r"))


def run(mimic_cxr: Path, out: Path, profile: str, beam_options: list[str]) -> None:
    """Runs the pipeline; UserError without apache-beam."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("apache-beam is not installed: pip install '.[beam]'") from None
    image_shape = profiles.rules(profile).image_shape
    chunks = chunk_list(mimic_cxr)
    with cache.private(out) as hidden:
        folder = (hidden / "images").resolve()  # a worker may run elsewhere
        folder.mkdir(exist_ok=True)
        with beam.Pipeline(options=PipelineOptions(beam_options)) as pipeline:
            _ = (
                pipeline
                | "chunks" >> beam.Create(chunks)
                | "spread" >> beam.Reshuffle()
                | "decode" >> beam.Map(decode_chunk, str(folder), str(mimic_cxr.resolve()), image_shape)
            )
    progress.say(f"{sum(map(len, chunks)):,} X-rays in {len(chunks):,} chunks are in {folder}")


def check_beam_options(options: list[str]) -> None:
    """UserError for an option that is one of ours misspelt: Beam would leave it out without a word."""
    for option in options:
        name = option.lstrip("-").partition("=")[0]
        # 0.8 tells 'profle' from Beam's own 'num_workers', which is 0.78 like our 'workers'.
        near = difflib.get_close_matches(name, OURS, n=1, cutoff=0.8)
        if option.startswith("-") and near:
            raise UserError(f"{option} is no option: did you mean --{near[0]}?")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; every other option is Beam's."""
    values.set_gnu_getopt(True)  # ours may follow Beam's, whose values absl cannot tell from the end of the options
    flags.DEFINE_string("mimic_cxr", None, "The MIMIC-CXR-JPG folder (holds files/).", flag_values=values)
    flags.DEFINE_string("out", None, "The output folder of the build.", flag_values=values)
    flags.DEFINE_string("profile", "paper", "As for the build: it decides the X-rays' shape.", flag_values=values)
    flags.DEFINE_integer("workers", None, "Processes of the DirectRunner; default: the cores.", flag_values=values)
    flags.DEFINE_string("runner", "DirectRunner", "Beam's runner.", flag_values=values)


def main(argv: list[str]) -> None:
    """The command; what absl left of the command line is Beam's."""
    values = flags.FLAGS
    check_beam_options(argv[1:])
    for name in ("mimic_cxr", "out"):
        given = getattr(values, name)
        if not given:
            raise UserError(f"--{name}=DIR is missing")
        if "://" in given:
            raise UserError(f"--{name}={given} is an address: give a folder that every worker has mounted")
    options = [f"--runner={values.runner}", *argv[1:]]
    if values.runner == "DirectRunner":
        workers = values.workers or len(os.sched_getaffinity(0))
        options += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    run(Path(values.mimic_cxr), Path(values.out), values.profile, options)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, pass_on_unknown=True, resumes=True)
