"""Write workdirs with simulated values, for tests of the report: `python tests/example_runs.py DIR`.

Labels are seen through two noisy signals, "ehr" and "cxr". Nothing is trained: no number is a model's.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np

from medfuse_jax import config as config_lib
from medfuse_jax import metrics, schema
from medfuse_jax import run as run_lib
from medfuse_jax.runs import calibration, checkpoints, subgroups
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import files

PROVENANCE = "simulated by tests/example_runs.py"


def simulate(task: str, num_stays: int, seed: int = 0) -> dict:
    """Return labels [N, K], the signals ehr and cxr [N, K], has_cxr [N] and age [N]."""
    rng = np.random.default_rng(seed)
    num_labels = len(schema.TASKS[task].labels)
    prevalence = rng.uniform(0.06, 0.45, num_labels)
    labels = rng.random((num_stays, num_labels)) < prevalence
    ehr = labels * rng.uniform(0.5, 1.5, num_labels) + rng.normal(size=labels.shape)
    cxr = labels * rng.uniform(0.2, 1.3, num_labels) + rng.normal(size=labels.shape)
    has_cxr = np.ones(num_stays, bool) if schema.TASKS[task].cxr_only else rng.random(num_stays) < 0.4
    return {"labels": labels, "ehr": ehr, "cxr": cxr, "has_cxr": has_cxr, "age": rng.uniform(18, 90, num_stays)}


def scores_of(method: str, data: dict) -> np.ndarray:
    """Return probabilities [N, K] as float32."""
    cxr = np.where(data["has_cxr"][:, None], data["cxr"], 0)
    weight = {"early": 0.3, "joint": 0.5, "medfuse": 0.8, "medfuse_attention": 0.8}
    logits = {"uni_ehr": data["ehr"], "uni_cxr": cxr}.get(method, data["ehr"] + weight.get(method, 0.4) * cxr)
    return (1 / (1 + np.exp(1.5 - logits))).astype(np.float32)


def attention_of(data: dict, num_steps: int = 60, seed: int = 0) -> dict:
    """Return attention weights that grow towards the end of a stay; an X-ray has about half of its stay's weight."""
    rng = np.random.default_rng(seed)
    num_stays = len(data["has_cxr"])
    length = rng.integers(3, num_steps + 1, num_stays)
    from_end = np.arange(num_steps) - length[:, None]
    raw = np.where(from_end < 0, np.exp(from_end / 12), 0) * rng.gamma(4, 1, from_end.shape)
    cxr = np.where(data["has_cxr"], rng.beta(4, 5, num_stays), 0)
    return {
        "time_weights": (raw / raw.sum(1, keepdims=True)).astype(np.float16),
        "length": length,
        "modality_weights": np.stack([0.2 * (1 - cxr), 0.8 * (1 - cxr), cxr], 1).astype(np.float32),
        "modalities": np.array(["static", "ehr", "cxr"]),
    }


def save_initial_weights(config, workdir: Path, epoch: int = 1) -> run_lib.Run:
    """Claim the workdir for a run of this config, save its initial weights as those of its best `epoch`; return it."""
    run = run_lib.open_run(config)
    workdir_lib.claim(workdir, run)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, run.fresh_state(), Progress(epoch=epoch, best_epoch=epoch), is_best=True)
    return run


def write_config(workdir: Path, task: str, method: str, **changes) -> None:
    """Write config.json."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = config_lib.default().to_dict()
    config |= {"name": f"simulated_{task}", "task": task, "method": method, "num_epochs": 20, "learning_rate": 1e-3}
    config["data"]["dir"] = "simulated_shards"
    (workdir / "config.json").write_text(json.dumps(config | changes, indent=2))


def write_training(workdir: Path, num_epochs: int = 20, seed: int = 0) -> int:
    """Write metrics.jsonl with learning curves of the usual shape; return the best epoch."""
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, num_epochs + 1)
    train_loss = 0.42 + 0.2 * np.exp(-epoch / 3) - 0.004 * epoch + rng.normal(0, 0.002, num_epochs)
    val_loss = (
        0.46 + 0.15 * np.exp(-epoch / 3) + 0.0006 * np.maximum(0, epoch - 9) ** 2 + rng.normal(0, 0.003, num_epochs)
    )
    val_auroc = 0.74 - 0.2 * np.exp(-epoch / 3) - 0.0008 * np.maximum(0, epoch - 11) ** 2
    val_auroc += rng.normal(0, 0.003, num_epochs)
    with (workdir / "metrics.jsonl").open("w") as file:
        for i, e in enumerate(epoch.tolist()):
            place = {"epoch": e, "step": 100 * e}
            train = {"train_loss": train_loss[i], "lr": 1e-3, "samples_per_s": 55.0, "num_steps": 100}
            val = {"val_loss": val_loss[i], "val_auroc": val_auroc[i]}
            for line in ({"phase": "train", **place, **train}, {"phase": "val", **place, **val}):
                line["time_s"] = 30.0 * e
                file.write(files.json_line(line))
    return int(epoch[val_auroc.argmax()])


def _with_groups(data: dict, labels: np.ndarray, scores: np.ndarray) -> dict:
    sexes = np.where(np.arange(len(labels)) % 2, "F", "M")
    units = np.where(np.arange(len(labels)) % 80, "Medical", "Rare")
    return {"labels": labels, "scores": scores, "age": data["age"], "gender": sexes, "first_careunit": units}


def _calibration(labels: np.ndarray, scores: np.ndarray) -> dict:
    temperature = calibration.fit_temperature(labels, scores)
    scaled = calibration.describe(labels, calibration.scale(scores, temperature))
    scaled = {"temperature": temperature} | {name: scaled[name] for name in ("brier_macro", "ece_macro", "curve")}
    return calibration.describe(labels, scores) | {"scaled": scaled} | _operating_points(labels, scores)


def _operating_points(labels: np.ndarray, scores: np.ndarray) -> dict:
    if labels.shape[1] > 1:
        return {}
    label, score = labels[:, 0], scores[:, 0]
    benefit = calibration.net_benefit(label, score)
    return {"operating_points": calibration.operating_points(label, score), "net_benefit": benefit}


def write_evaluation(
    workdir: Path, task: str, method: str, data: dict, best_epoch: int, against: tuple[str, ...] = (), num_bootstrap=40
) -> None:
    """Write predictions_test.npz and result.json."""
    labels, has_cxr = data["labels"], data["has_cxr"]
    scores = scores_of(method, data)
    np.savez(
        workdir / "predictions_test.npz",
        **(attention_of(data) if method == "medfuse_attention" else {}),
        stay_id=np.full(len(labels), -1) if schema.TASKS[task].cxr_only else np.arange(len(labels)),
        subject_id=np.arange(len(labels)),
        scores=scores,
        labels=labels.astype(np.int8),
        has_ehr=np.full(len(labels), not schema.TASKS[task].cxr_only),
        has_cxr=has_cxr,
        age=data["age"].astype(np.float32),
        **dict.fromkeys((*schema.STATIC_TEXTS, schema.RACE), np.full(len(labels), "unknown")),
        step=100 * best_epoch,
    )
    masks = {"all": np.ones_like(has_cxr)} | ({} if has_cxr.all() else {"paired": has_cxr, "unpaired": ~has_cxr})
    label_types = schema.label_types(task, schema.TASKS[task].labels)
    comparisons = [
        {"against": other, "subset": name}
        | metrics.compare(labels[mask], scores_of(other, data)[mask], scores[mask], num_bootstrap)
        for other in against
        for name, mask in masks.items()
    ]
    result = {
        "name": f"simulated_{task}",
        "task": task,
        "method": method,
        "split": "test",
        "seed": 0,
        "num_params": 1_234_567,
        "step": 100 * best_epoch,
        "best_epoch": best_epoch,
        "selected_by": "AUROC on all validation stays",
        "loss": 0.42,
        "num_left_out": 0,
        "data": {
            "dir": "simulated_shards",
            "profile": "paper",
            "timestep_h": 2.0,
            "synthetic": True,
            "shards": "of one build",
        },
        "labels": list(schema.TASKS[task].labels),
        "resample": "stay",
        "subsets": {
            name: metrics.evaluate(labels[mask], scores[mask], num_bootstrap, label_types=label_types)
            for name, mask in masks.items()
        },
        "subgroups": subgroups.describe(_with_groups(data, labels, scores), num_bootstrap, 0, None),
        "calibration": _calibration(labels, scores),
        "comparisons": comparisons,
        "environment": {
            "devices": PROVENANCE,
            "python": "3.11.7",
            "platform": "Linux",
            "packages": {"jax": "0.10.2", "flax": "0.12.0"},
        },
    }
    (workdir / "result.json").write_text(json.dumps(metrics.to_json(result), indent=1))


def write_run(workdir: Path, task: str, method: str, data: dict, against: tuple[str, ...] = (), seed: int = 0) -> None:
    """Write a whole workdir."""
    write_config(workdir, task, method)
    write_evaluation(workdir, task, method, data, write_training(workdir, seed=seed), against)


def write_fusion(workdir: Path, task: str = "pheno", num_stays: int = 400) -> None:
    """Write a MedFuse run with its two pre-training runs."""
    data = simulate(task, num_stays)
    write_run(workdir / "pretrain_ehr", task, "uni_ehr", data, seed=1)
    write_run(workdir / "pretrain_cxr", "radiology", "uni_cxr", simulate("radiology", num_stays // 2), seed=2)
    write_run(workdir, task, "medfuse", data, against=("uni_ehr",))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_fusion(root / "pheno")
    write_fusion(root / "mortality", "mortality", num_stays=1500)
    sweep_data = simulate("pheno", 300, seed=3)
    for method in ("uni_ehr", "early", "joint", "medfuse"):
        write_run(root / "several" / method, "pheno", method, sweep_data, seed=len(method))
    write_run(root / "attention", "pheno", "medfuse_attention", sweep_data)
    write_config(root / "unfinished", "pheno", "medfuse")
    write_training(root / "unfinished", num_epochs=7)
    with (root / "unfinished" / "metrics.jsonl").open("a") as log:
        log.write('{"phase": "train", "epo')
