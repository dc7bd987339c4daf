"""Plan synthetic X-rays, and write their files and tables as in MIMIC-CXR-JPG 2.0.0."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from scipy.special import expit

from data_prep import progress
from data_prep.synthetic import draw
from data_prep.synthetic.cohort import FIRST_DAY, unique_ids
from data_prep.synthetic.signal import IMAGE_LATENTS
from medfuse_jax import schema

EARLY_SHARE = 0.85  # of the paired stays: first X-ray in the first 48 h
CHANGE = 2.0  # of the effusion between the two X-rays of a stay, in standard deviations, if changes are planted
IMAGE_NOISE = 0.2  # standard deviation of an X-ray's latents around its stay's
UNCERTAIN_SHARE, MENTIONED_SHARE = 0.06, 0.25  # findings labelled -1; negative findings labelled 0, not blank

# A finding is present with p = sigmoid(5 (weights . image latents - threshold)).
FINDINGS = {
    "Atelectasis": (0.6, {"effusion": 0.8, "nodule": 0.4}),
    "Cardiomegaly": (0.6, {"heart": 1.0}),
    "Consolidation": (1.2, {"nodule": 1.0}),
    "Edema": (0.7, {"haze": 1.0}),
    "Enlarged Cardiomediastinum": (1.5, {"heart": 1.0}),
    "Fracture": (0.7, {}),  # not drawn: no model can find it
    "Lung Lesion": (0.9, {"nodule": 1.0}),
    "Lung Opacity": (0.5, {"haze": 0.7, "nodule": 0.7}),
    "Pleural Effusion": (0.4, {"effusion": 1.0}),
    "Pleural Other": (1.8, {"effusion": 1.0}),
    "Pneumonia": (0.8, {"haze": 0.6, "nodule": 0.8}),
    "Pneumothorax": (1.0, {"lucency": 1.0}),
    "Support Devices": (0.0, {"device": 1.0}),
}
VIEWS = {  # procedure, view code
    "AP": ("CHEST (PORTABLE AP)", "antero-posterior"),
    "PA": ("CHEST (PA AND LAT)", "postero-anterior"),
    "LATERAL": ("CHEST (PA AND LAT)", "lateral"),
}


def _studies_of_stays(
    rng, stays: pl.DataFrame, image_latents_NE, cxr_fraction: float, grew_N: np.ndarray | None
) -> list[pl.DataFrame]:
    """Return studies of patients with a stay: during it (AP, or PA and lateral only), before it and after it."""
    first_latents_NE = image_latents_NE.copy()
    if grew_N is not None:
        first_latents_NE[:, IMAGE_LATENTS.index("effusion")] -= np.where(grew_N, CHANGE, -CHANGE)
    los_h = stays["los_h"].to_numpy()
    kept = (stays["kind"] == "kept").to_numpy()
    num_kept = int(kept.sum())
    order = rng.permutation(num_kept)  # kept stays come first in the frame
    paired, unpaired = np.split(order, [round(cxr_fraction * num_kept)])
    dropped = np.flatnonzero(~kept)
    dropped = dropped[rng.random(len(dropped)) < cxr_fraction]
    frames = []

    def add(rows, hours, view, own_state, latents_NE=image_latents_NE):
        noise = rng.standard_normal((len(rows), len(IMAGE_LATENTS)))
        latents = latents_NE[rows] + IMAGE_NOISE * noise if own_state else noise
        frames.append(_studies(stays["subject_id"].to_numpy()[rows], latents, view, rows, hours))

    def within(rows, start_h, end_h):
        return start_h + (end_h - start_h) * rng.uniform(0.02, 0.98, len(rows))

    late = (rng.random(len(paired)) >= EARLY_SHARE) & (los_h[paired] > 60)
    first_h = within(paired, np.where(late, 48.5, 0), np.where(late, los_h[paired], np.minimum(los_h[paired], 48)))
    add(paired, first_h, "AP", True, first_latents_NE)
    add(dropped, within(dropped, 0, los_h[dropped]), "AP", own_state=True)
    again = paired[rng.random(len(paired)) < (0.5 if grew_N is None else 1)]
    again_h = first_h[np.isin(paired, again)]
    add(again, within(again, again_h, los_h[again]), "AP", own_state=True)
    standing = np.concatenate([paired[: len(paired) // 10], unpaired[: len(unpaired) // 20]])
    add(standing, within(standing, 0, los_h[standing]), "PA", own_state=True)
    outside = order[rng.random(num_kept) < 0.12]
    days = rng.uniform(0.5, 60, len(outside)) * 24
    before = (rng.random(len(outside)) < 0.5) | stays["died"].to_numpy()[outside]
    add(outside, np.where(before, -days, los_h[outside] + days), "AP", own_state=False)
    return frames


def _studies(subject_id, latents, view, rows, hours) -> pl.DataFrame:
    """Return one row per study. view: 'AP', or 'PA' for a PA and a lateral X-ray; rows: of the stays, -1 for none."""
    view = np.broadcast_to(view, len(rows))
    frame = pl.DataFrame({"subject_id": subject_id, "row": rows, "hours": hours, "view": view})
    return frame.with_columns(pl.Series(f"image_{name}", latents[:, i]) for i, name in enumerate(IMAGE_LATENTS))


def _studies_without_stay(rng, taken: np.ndarray, num_images: int) -> pl.DataFrame:
    """Return studies with `num_images` X-rays, or one more, of people without an ICU stay."""
    view = np.where(rng.random(num_images) < 0.2, "PA", "AP")
    num = int(np.searchsorted(np.cumsum(1 + (view == "PA")), num_images)) + 1
    person = np.cumsum(rng.random(num) < 0.6)
    ids = unique_ids(rng, 10_000_000, person[-1] + 1, taken)
    hours = rng.uniform(0, 90 * 365 * 24, num)
    latents = rng.standard_normal((num, len(IMAGE_LATENTS)))
    return _studies(ids[person], latents, view[:num], np.full(num, -1), hours)


def plan(
    rng: np.random.Generator,
    stays: pl.DataFrame,
    image_latents_NE,
    cxr_fraction: float,
    num_images: int,
    grew_N: np.ndarray | None = None,
) -> pl.DataFrame:
    """Plan all X-rays: ids, view, row of the stay (-1: none), hours since its intime, time, and latents as `image_*`.

    grew_N: whether the effusion of each stay grew before its last X-ray or shrank, or None if it did not change.
    Patients without a stay get at least one X-ray, and as many as bring the total to `num_images`.
    """
    studies = pl.concat(_studies_of_stays(rng, stays, image_latents_NE, cxr_fraction, grew_N))
    num_so_far = len(studies) + (studies["view"] == "PA").sum()
    taken = stays["subject_id"].unique().to_numpy()
    studies = pl.concat([studies, _studies_without_stay(rng, taken, max(1, num_images - num_so_far))])
    row, hours = studies["row"].to_numpy(), studies["hours"].to_numpy()
    start = np.where(row < 0, FIRST_DAY, stays["intime"].to_numpy()[row])
    studies = studies.with_columns(
        study_id=pl.Series(unique_ids(rng, 50_000_000, len(studies))),
        time=pl.Series(start + np.round(hours * 3_600_000).astype("timedelta64[ms]")),
    )
    lateral = studies.filter(pl.col("view") == "PA").with_columns(
        view=pl.lit("LATERAL"), time=pl.col("time") + pl.duration(seconds=95)
    )
    planned = pl.concat([studies, lateral]).sort("subject_id", "study_id", "view")
    digits = rng.integers(0, 16, (len(planned), 40))
    texts = ["".join("0123456789abcdef"[d] for d in row) for row in digits]
    return planned.with_columns(
        dicom_id=pl.Series("-".join(text[i : i + 8] for i in range(0, 40, 8)) for text in texts)
    )


def tables(rng: np.random.Generator, planned: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the metadata, CheXpert and split tables, by name without suffix."""
    time = pl.col("time").dt
    clock = time.hour().cast(pl.Int32) * 10_000 + time.minute().cast(pl.Int32) * 100 + time.second()
    person = planned["subject_id"].unique(maintain_order=True)
    split = pl.Series(rng.choice(["train", "validate", "test"], len(person), p=[0.97, 0.01, 0.02]))
    split = pl.DataFrame({"subject_id": person, "split": split})
    metadata = planned.select(
        "dicom_id",
        "subject_id",
        "study_id",
        PerformedProcedureStepDescription=_view_text(0),
        ViewPosition="view",
        Rows=pl.lit(draw.ROWS_PX),
        Columns=pl.lit(draw.COLUMNS_PX),
        StudyDate=time.strftime("%Y%m%d"),
        StudyTime=clock + time.millisecond() / 1000,  # HHMMSS.fff as a number: no leading zeros
        ProcedureCodeSequence_CodeMeaning=_view_text(0),
        ViewCodeSequence_CodeMeaning=_view_text(1),
        PatientOrientationCodeSequence_CodeMeaning=pl.lit("Erect"),
    )
    return {
        "mimic-cxr-2.0.0-metadata": metadata,
        "mimic-cxr-2.0.0-chexpert": _chexpert(rng, planned),
        "mimic-cxr-2.0.0-split": planned.join(split, on="subject_id", how="left", maintain_order="left").select(
            "dicom_id", "study_id", "subject_id", "split"
        ),
    }


def _view_text(place: int) -> pl.Expr:
    return pl.col("view").replace_strict({view: texts[place] for view, texts in VIEWS.items()})


def _chexpert(rng, planned: pl.DataFrame) -> pl.DataFrame:
    """Return one row per study, each finding 1, 0, -1 (uncertain) or blank (not mentioned)."""
    studies = planned.unique("study_id", keep="first", maintain_order=True)
    labels, any_finding = {}, np.zeros(len(studies), bool)
    for finding, (threshold, weights) in FINDINGS.items():
        score = np.full(len(studies), -threshold)
        for name, weight in weights.items():
            score += weight * studies[f"image_{name}"].to_numpy()
        present = rng.random(len(studies)) < expit(5 * score)
        any_finding |= present & (finding != "Support Devices")
        uncertain = rng.random(len(studies)) < UNCERTAIN_SHARE
        mentioned = present | (rng.random(len(studies)) < MENTIONED_SHARE)
        value = np.where(uncertain, -1.0, present.astype(float))
        labels[finding] = np.where(mentioned | uncertain, value, np.nan)
    labels["No Finding"] = np.where(any_finding, np.nan, 1.0)
    columns = [pl.Series(label, labels[label]).fill_nan(None) for label in schema.RADIOLOGY_LABELS]
    return studies.select("subject_id", "study_id", *columns).sort("study_id")


@contextlib.contextmanager
def drawing(folder: Path, planned: pl.DataFrame, seed: int, workers: int) -> Iterator[None]:
    """Draw every X-ray to files/p<two digits>/p<subject>/s<study>/<dicom>.jpg during the block, in `workers` processes.

    They are plain commands (draw.py), which start from any thread, script or notebook, with or without jax in it.
    They end with the block, on an error in it, and soon after this process is killed, when their input ends.
    """
    path = pl.format(
        "files/p{}/p{}/s{}/{}.jpg", pl.col("subject_id") // 1_000_000, "subject_id", "study_id", "dicom_id"
    )
    paths, views = planned.select(path).to_series().to_list(), planned["view"].to_list()
    latents = planned.select(f"image_{name}" for name in IMAGE_LATENTS).rows()
    command = [sys.executable, "-m", "data_prep.synthetic.draw", str(folder), str(seed)]
    code = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])  # this copy of the code
    # glibc's malloc would return the pixels' memory to the system after each operation: a fifth of the time.
    malloc = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(64 << 20))
    environment = os.environ | malloc | {"PYTHONPATH": code.rstrip(os.pathsep)}
    children = [
        # A small pipe: the child draws what is left in it if this process is killed.
        subprocess.Popen(command, stdin=subprocess.PIPE, pipesize=1 << 14, env=environment)
        for _ in range(workers)
    ]

    def feed() -> None:
        with contextlib.suppress(OSError):  # the process has failed or was ended, which its status says
            for i in progress.bar(range(len(paths)), "drawing X-rays", "images"):
                line = json.dumps([i, paths[i], views[i], latents[i]])
                children[i % workers].stdin.write(line.encode() + b"\n")  # waits while the process has much to do
        for child in children:
            with contextlib.suppress(OSError):
                child.stdin.close()

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield
        for child in children:
            if (status := child.wait()) > 1:
                raise OSError(status, os.strerror(status), str(folder))
            assert not status, f"drawing X-rays failed with exit status {status}"
    finally:
        for child in children:
            child.kill()
            child.wait()
        feeder.join()
