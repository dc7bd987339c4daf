"""Before a build, decode X-rays in many processes or on many machines with Apache Beam (`pip install .[beam]`).

    python -m data_prep.images.beam --mimic_cxr=DIR --out=DIR [--profile=paper] [--workers=N]
        [--runner=DirectRunner|DataflowRunner|FlinkRunner|SparkRunner] [any other option of Beam]

Decodes every labelled X-ray of MIMIC-CXR-JPG into the image cache of `--out`, byte for byte as
`python -m data_prep.build` would. That command, run afterwards with the same --out, --profile and --mimic_cxr, decodes
none of these X-rays again, for any --tasks. Both flags name folders, not addresses (gs://, s3://); on a cluster, every
worker must mount them at the same path. apache-beam requires an older protobuf than TensorFlow Datasets does: if pip
cannot install both, give Beam its own environment. It needs neither jax nor TFDS, but the same version of Pillow as the
build.
"""

import difflib
import os
from pathlib import Path

import numpy as np
from absl import flags

from data_prep import cache, profiles, progress
from data_prep.images import chexpert, metadata, store
from data_prep.raw import tables
from medfuse_jax.runtime import command_line, cores, files
from medfuse_jax.runtime.errors import UserError

_OUR_FLAGS = ("mimic_cxr", "out", "profile", "workers", "runner")


def chunk_list(mimic_cxr: Path) -> list[list[tuple[str, str]]]:
    """Return the chunks that the task 'radiology' needs: every labelled X-ray."""
    raw = tables.mimic_cxr(mimic_cxr)
    images, _ = metadata.read_metadata(raw)
    return store.chunks(chexpert.of_labelled_studies(raw, images).select("dicom_id", "path").iter_rows())


def decode_chunk(images: list, folder: str, root: str, image_shape: str) -> int:
    """Decode one chunk into the cache, readable by the owner alone; return how many of its X-rays are readable."""
    old_umask = os.umask(0o077)
    try:
        path = store.write_chunk(Path(folder), Path(root), image_shape, [tuple(image) for image in images])
    finally:
        os.umask(old_umask)
    return len(np.load(path, mmap_mode="r"))


def run(mimic_cxr: Path, out: Path, profile: str, beam_options: list[str]) -> None:
    """Run the pipeline; raise UserError if apache-beam is not installed."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("apache-beam is not installed: pip install '.[beam]'") from None
    image_shape = profiles.rules(profile).image_shape
    chunks = chunk_list(mimic_cxr)
    with cache.private(out) as hidden:
        folder = (hidden / "images").resolve()  # workers may have another working directory
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
    """Raise UserError for a misspelt flag of ours: Beam ignores options it does not know."""
    for option in options:
        name = option.lstrip("-").partition("=")[0]
        # The cutoff separates 'profle' from Beam's 'num_workers', which resembles our 'workers' at 0.78.
        near = difflib.get_close_matches(name, _OUR_FLAGS, n=1, cutoff=0.8)
        if option.startswith("-") and near:
            raise UserError(f"{option} is unknown; did you mean --{near[0]}?", field=option, nearest=f"--{near[0]}")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    values.set_gnu_getopt(True)  # our flags may follow values of Beam's, which absl takes for arguments
    flags.DEFINE_string("mimic_cxr", None, "The MIMIC-CXR-JPG folder (contains files/).", flag_values=values)
    flags.DEFINE_string("out", None, "The build's output folder.", flag_values=values)
    flags.DEFINE_string("profile", "paper", "The build's profile, which decides the X-rays' shape.", flag_values=values)
    flags.DEFINE_integer("workers", None, "DirectRunner's processes; default: one per core.", flag_values=values)
    flags.DEFINE_string("runner", "DirectRunner", "Beam's runner.", flag_values=values)


def main(argv: list[str]) -> None:
    """Run the command; pass arguments that absl does not know on to Beam."""
    values = flags.FLAGS
    check_beam_options(argv[1:])
    for name in ("mimic_cxr", "out"):
        folder = getattr(values, name)
        if not folder:
            raise UserError(f"--{name}=DIR is missing", field=f"--{name}")
        files.check_local(f"--{name}", folder)
    options = [f"--runner={values.runner}", *argv[1:]]
    if values.runner == "DirectRunner":
        workers = values.workers or cores.usable()
        options += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    run(Path(values.mimic_cxr), Path(values.out), values.profile, options)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, pass_on_unknown=True, resumes=True)
