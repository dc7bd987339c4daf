"""Train on a synthetic cohort whose best reachable AUROC is known: do runs find the planted signal, and only that?

    PYTHONPATH=.:tests python -m reliability.optimum --dir=DIR [--stays=40000] [--share=0.19] [--runs=lstm,cxr,medfuse]
        [--start=DIR] [--json=FILE]

Prints one line a run as it ends; rerun the command to resume. docs/evaluation.md has the result. --share: of the stays
with an X-ray. --start: the folder of an earlier study whose lstm and cxr the runs *_on go on from. The same number of
stays has the same series and labels for any share.

A run's scores are judged by the true probabilities of the labels (data_prep/synthetic/signal.py): the expected AUROC,
without the noise of the labels drawn. Shapes: N test stays, K labels.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
from reliability import seen
from sweep_commands import ROOT

from data_prep import build
from data_prep.synthetic import draw, signal, tree

SHARE = 0.19  # as in MIMIC
_ENCODERS = ("--config.init.ehr={dir}/runs/lstm", "--config.init.cxr={dir}/runs/cxr")
_TRAINED = "--config.model.freeze_encoders=False"
_TUNED = (*_ENCODERS, _TRAINED, "--config.learning_rate=5e-4")
NO_SIGNAL = "no_signal"  # of a cohort whose phenotypes depend on nothing
RUNS = {  # name -> flags of `main` beside configs/demo.py, in the order in which they need each other
    "lstm": (
        *("--config.method=uni_ehr", "--config.batch_size=32", "--config.learning_rate=2e-3"),
        *(_TRAINED, "--config.num_epochs=8"),
    ),
    "cxr": (
        *("--config.method=uni_cxr", "--config.task=radiology", "--config.learning_rate=2e-3"),
        *(_TRAINED, "--config.num_epochs=20"),
    ),
    "medfuse": (*_ENCODERS, "--config.num_epochs=8"),
    **{
        f"{norm}_{share}": (
            *(*_TUNED, f"--config.num_epochs={epochs}"),
            *(f"--config.model.batch_norm={norm}", f"--config.data.ehr_only_ratio={share}"),
        )
        for share, epochs in ((0.0, 4), (0.18, 4), (1.0, 2))  # 16, 9 and 3 X-rays in a batch of 16
        for norm in ("batch", "frozen")
    },
    "lstm_on": (  # from here on: each goes on from an earlier run, at a lower rate
        *("--config.method=uni_ehr", "--config.init.model={start}/runs/lstm", "--config.batch_size=64"),
        *(_TRAINED, "--config.learning_rate=6e-4", "--config.plateau_epochs=1", "--config.num_epochs=3"),
    ),
    "cxr_on": (
        *("--config.method=uni_cxr", "--config.task=radiology", "--config.init.model={start}/runs/cxr"),
        *(_TRAINED, "--config.batch_size=32", "--config.learning_rate=1e-3", "--config.num_epochs=3"),
    ),
    "fusion_on": (
        *("--config.init.ehr={dir}/runs/lstm_on", "--config.init.cxr={dir}/runs/cxr_on"),
        *("--config.batch_size=32", "--config.learning_rate=2e-3", "--config.num_epochs=2"),
    ),
    "medfuse_on": (
        *("--config.init.model={dir}/runs/fusion_on", _TRAINED),
        *("--config.batch_size=32", "--config.learning_rate=5e-4", "--config.num_epochs=3"),
    ),
    "medfuse_last": (
        *("--config.init.model={dir}/runs/medfuse_on", _TRAINED),
        *("--config.batch_size=32", "--config.learning_rate=1.5e-4", "--config.num_epochs=2"),
    ),
    NO_SIGNAL: (),
}
OF_FINDINGS = ("cxr", "cxr_on")  # their scores are not of phenotypes


def expected(raw: Path, task: str, predictions: dict) -> dict:
    """Return the expected AUROC of a run's scores, and the best there is, of all stays and those with an X-ray.

    predictions: as in predictions_test.npz. Of each group of labels too: signal.Rule.group. 'best' knows the latents of
    both modalities where there is an X-ray; 'best_ehr' and 'best_cxr' those of one. 'seen' and 'seen_ehr' know what the
    records show of them at most (seen.py).
    """
    truth = pl.DataFrame({"stay_id": predictions["stay_id"]}).join(
        pl.read_csv(raw / "truth.csv.gz"), on="stay_id", how="left", maintain_order="left"
    )
    vitals = truth.select([f"vital_{name}" for name in signal.VITAL_LATENTS]).to_numpy()
    image = truth.select([f"image_{name}" for name in draw.IMAGE_LATENTS]).to_numpy()
    by_input = signal.probabilities(task, vitals, image)
    has_cxr_N = predictions["has_cxr"]
    by_records = seen.scores(task, vitals, image, _hours(raw, predictions["stay_id"]))
    best_NK, seen_NK = (np.where(has_cxr_N[:, None], of["both"], of["ehr_only"]) for of in (by_input, by_records))
    found = {}
    for subset, rows in (("all", np.full(len(truth), True)), ("paired", has_cxr_N), ("unpaired", ~has_cxr_N)):
        if not rows.any():
            continue
        scores = {"found": predictions["scores"], "best": best_NK, "best_ehr": by_input["ehr_only"]}
        scores |= {"seen": seen_NK, "seen_ehr": by_records["ehr_only"]}
        if subset == "paired":
            scores["best_cxr"] = by_input["cxr_only"]
        auroc = {name: _by_group(task, by_input["both"][rows], score_NK[rows]) for name, score_NK in scores.items()}
        found[subset] = {"num_stays": int(rows.sum()), **auroc}
    return found


def _hours(raw: Path, stay_id_N: np.ndarray) -> np.ndarray:
    """Return the length of each stay in whole hours, rounded up."""
    stays = pl.read_csv(raw / "mimic-iv" / "icu" / "icustays.csv.gz", columns=["stay_id", "los"])
    of = pl.DataFrame({"stay_id": stay_id_N}).join(stays, on="stay_id", how="left", maintain_order="left")
    return np.ceil(of["los"].to_numpy() * 24).astype(int)


def _by_group(task: str, true_p_NK: np.ndarray, score_NK: np.ndarray) -> dict[str, float]:
    """Return the mean expected AUROC of all labels, 'macro', and of each group of labels."""
    of_label: dict[str, list[float]] = {"macro": []}
    for rule, true_p_N, score_N in zip(signal.RULES[task], true_p_NK.T, score_NK.T, strict=True):
        auroc = signal.expected_auroc(true_p_N, score_N)
        for name in ("macro", rule.group):
            of_label.setdefault(name, []).append(auroc)
    return {name: round(float(np.mean(of)), 4) for name, of in of_label.items()}


def cohort(folder: Path, num_stays: int, share: float, scale: float) -> Path:
    """Write and build a cohort, unless it is there; return the folder of its shards.

    share: of the stays with an X-ray. scale: see signal.SCALE.
    """
    signal.SCALE = scale
    raw, shards = folder / "raw", folder / "shards"
    tree.write(raw, num_stays=num_stays, seed=7, cxr_fraction=share, images_per_stay=0.25)
    tasks = ["pheno", "mortality", "radiology"]
    build.build(mimic_iv=raw / "mimic-iv", mimic_cxr=raw / "mimic-cxr", out=shards, tasks=tasks)
    return shards


def train(shards: Path, workdir: Path, flags: list[str]) -> None:
    """Run `main` to its end; what it prints goes to stderr."""
    command = [sys.executable, "-m", "medfuse_jax.main", "--config=configs/demo.py", "--config.model.ehr_hidden=128"]
    command += [f"--config.data.dir={shards}", f"--workdir={workdir}", *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def judge(raw: Path, workdir: Path) -> dict:
    with np.load(workdir / "predictions_test.npz") as stored:
        found = expected(raw, "pheno", {name: stored[name] for name in ("stay_id", "scores", "has_cxr")})
    measured = json.loads((workdir / "result.json").read_text())["subsets"]["all"]
    return found | {"measured": {name: measured[name] for name in ("auroc_macro", "auroc_macro_ci")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--stays", type=int, default=40_000)
    parser.add_argument("--share", type=float, default=SHARE, help="of the stays with an X-ray")
    parser.add_argument("--start", type=Path, help="folder of an earlier study; default: --dir")
    parser.add_argument("--runs", default=",".join(RUNS), help="which runs, with commas between")
    parser.add_argument("--json", type=Path, help="where to write the result too")
    given = parser.parse_args()
    folder, scale = given.dir.absolute(), signal.SCALE
    start = (given.start or folder).absolute()
    result = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    for name in given.runs.split(","):
        is_empty = name == NO_SIGNAL
        of = folder / name if is_empty else folder
        num_stays, of_scale = (given.stays // 4, 0.0) if is_empty else (given.stays, scale)
        shards = cohort(of, num_stays, given.share, of_scale)
        workdir = of / "runs" / name
        train(shards, workdir, [flag.format(dir=folder, start=start) for flag in RUNS[name]])
        if name not in OF_FINDINGS:
            result[name] = judge(of / "raw", workdir)
            print(json.dumps({name: result[name]}), flush=True)
            if given.json:
                given.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
