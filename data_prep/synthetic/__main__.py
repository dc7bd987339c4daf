"""The command `python -m data_prep.synthetic`: write a synthetic cohort as raw MIMIC-shaped tables and X-rays."""

from absl import flags

from data_prep.synthetic import signal, tree
from medfuse_jax.runtime import command_line

FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "A new or empty folder to write to.", required=True)
    flags.DEFINE_integer("stays", 1000, "ICU stays that pass the cohort filters.")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same bytes.")
    flags.DEFINE_float("cxr_fraction", 0.19, "Fraction of the stays with an AP X-ray during the stay.")
    flags.DEFINE_float("images_per_stay", 1.5, "X-rays per stay, including those of patients without a stay.")
    flags.DEFINE_bool("change", False, "Plant a phenotype that only the change between two X-rays shows.")


def main(argv: list[str]) -> None:
    del argv
    counts = (FLAGS.stays, FLAGS.seed, FLAGS.cxr_fraction, FLAGS.images_per_stay)
    report = tree.write(FLAGS.out, *counts, change=FLAGS.change)
    print(f"{FLAGS.out}: {report['num_stays']} stays, {report['num_images']} X-rays. Best expected AUROC (macro):")
    for task in signal.RULES:
        for subset in ("all", "paired"):
            best = report[task][subset]
            macros = {name: best[name]["macro"] for name in best if name != "num_stays"}
            numbers = ", ".join(f"{name} {macro:.3f}" for name, macro in macros.items() if macro is not None)
            print(f"  {task:9} {best['num_stays']:6} {subset:6} stays: {numbers or 'too few'}")


if __name__ == "__main__":
    _define_flags()
    command_line.run(main)
