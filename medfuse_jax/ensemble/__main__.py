"""Combine the scores of finished runs: `python -m medfuse_jax.ensemble --runs=A,B --workdir=C`.

A member is a workdir, or another classifier head of its model: `DIR:ehr_only`. Its predictions are read from its
workdir; if they are missing or from older weights, they are made first. --rule says how to combine a stay's scores:

    average    the mean probability of the members that score the stay: the late average of uni_ehr and uni_cxr,
               or of MMTM's two single-modality heads
    weighted   the same, with weights chosen by macro AUROC on the validation stays
    by_cxr     the first member for stays with an X-ray, the second for those without: with MedFuse first and
               the LSTM second, the ensemble of Table A3 (Hayat et al. 2022)
"""

from pathlib import Path

from absl import flags

from medfuse_jax.ensemble import command
from medfuse_jax.report import terminal
from medfuse_jax.runs import result
from medfuse_jax.runtime import command_line, compilation


def main(argv: list[str]) -> None:
    compilation.configure()
    workdir = Path(flags.FLAGS.workdir)
    print(terminal.table([command.ensemble(flags.FLAGS.runs, workdir, flags.FLAGS.rule)]))
    print(f"\nwritten: {result.TEST.result_path(workdir)}")


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Workdirs of finished runs, each DIR or DIR:HEAD.", required=True)
    flags.DEFINE_string("workdir", None, "Folder for the ensemble's predictions and result.", required=True)
    flags.DEFINE_string("rule", "average", "average, weighted or by_cxr.")
    command_line.run(main)
