"""The benchmark's cases and presets.

A case's contenders take turns on the same batches, so that other load on the machine affects them all equally.
"""

import dataclasses
import json

from medfuse_jax.runtime.errors import check_choice

PEERS = ("torch_released", "torch_tuned")


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    kind: the module of this folder that measures it. cxr_share: fraction of paired stays; it sets the number of
    X-ray slots in a batch. placement: config.placement, for 'feed'. parallel: 'pmap' or 'shard_map'. num_batches:
    batches per repeat, at equal quantiles of their longest stay. peers: PyTorch variants to compare with, if torch
    is installed. sizes: model fields that differ from the released sizes. num_trials: for 'trials' and 'sweep'.
    lanes: for 'trials', trials computed in one call; 0: measured. num_epochs: for 'sweep'. kernels: for 'lstm', the
    only ones to compare with the plain scan; (): all.
    """

    kind: str = "step"
    method: str = "medfuse"
    batch_size: int = 16
    cxr_share: float = 0.19
    precision: str = "float32"
    placement: str = "stream"
    parallel: str = "pmap"
    num_devices: int = 1
    timestep_h: float = 2.0
    max_buckets: int = 4
    num_stays: int = 42_628  # phenotyping's train split (Hayat et al. 2022, Table 1)
    num_batches: int = 4
    warm_up: int = 1  # untimed passes over the batches
    repeats: int = 5
    resize_px: int = 256
    crop_px: int = 224
    peers: tuple[str, ...] = PEERS
    sizes: tuple[tuple[str, object], ...] = ()
    num_trials: int = 10
    num_epochs: int = 3
    lanes: int = 0
    kernels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The case's name, unique within its preset."""
        if self.kind == "bootstrap":
            return f"bootstrap N={self.num_stays}"
        if self.kind == "sweep":
            return f"sweep {self.method} {self.num_trials} trials"
        if self.kind == "rates":
            return "rates of the device"
        if self.kind == "dispatch":
            return f"dispatch {self.parallel}"
        if self.kind == "reading":
            paired = "" if self.method.startswith("uni_") else f" {self.cxr_share:.0%} paired"
            return f"reading {self.method} B={self.batch_size}{paired}"
        parts = [self.kind, "+".join(self.kernels) or self.method, f"B={self.batch_size}"]
        if self.method != "uni_ehr" and self.kind != "lstm":
            parts.append(f"{self.cxr_share:.0%} paired")
        parts += [f"{self.timestep_h:g} h", self.precision]
        if self.kind == "feed":
            parts.append(self.placement)
        if self.kind == "trials":
            parts.append(f"{self.num_trials} trials" + (f" {self.lanes} at once" if self.lanes else ""))
        if self.num_devices > 1:
            parts.append(f"{self.num_devices} devices")
        if self.parallel != "pmap":
            parts.append(self.parallel)
        return " ".join(parts)


_READERS = ("medfuse", "uni_ehr", "uni_cxr")  # series and X-rays, series, X-rays of radiology


def _cpu() -> list[Case]:
    """Return the cases with targets on a CPU, the headline first."""
    return [
        Case(max_buckets=2, num_batches=3),
        Case(cxr_share=1.0, max_buckets=1, num_batches=1),
        Case(kind="bootstrap", num_stays=11_914),
        Case(kind="lstm", num_batches=6),
        Case(kind="first_step", max_buckets=1),
        Case(kind="feed", max_buckets=1, num_batches=4),
        Case(kind="feed", max_buckets=1, num_batches=4, placement="device"),
        Case(kind="lstm", timestep_h=1.0, num_batches=6),
        Case(method="uni_ehr", max_buckets=2),
        *(Case(kind="reading", method=m, batch_size=b, peers=()) for m in _READERS for b in (16, 256)),
    ]


_BF16: dict = {"precision": "bfloat16", "max_buckets": 1, "num_batches": 8}


def _gpu() -> list[Case]:
    """Return the cases for one large GPU, the most important first: the time budget may drop the last ones."""
    lstm: dict = {"kind": "lstm", "precision": "bfloat16", "max_buckets": 4, "num_batches": 8}
    check: dict = lstm | {"num_batches": 2, "repeats": 3, "peers": ()}
    tuned: dict = _BF16 | {"peers": ("torch_tuned",)}
    return [
        Case(kind="rates"),
        Case(**check, kernels=("pallas",)),
        Case(**check | {"precision": "float32"}, kernels=("pallas",)),
        Case(**check | {"precision": "float32"}, kernels=("cudnn",)),
        Case(**lstm),
        Case(**lstm, batch_size=256),
        Case(**_BF16),
        Case(**_BF16, batch_size=256, cxr_share=1.0),
        *_on_accelerators(),
        Case(**tuned, method="uni_cxr", batch_size=256, cxr_share=1.0),
        Case(**_BF16, batch_size=256),
        Case(**_BF16, cxr_share=1.0),
        Case(**lstm | {"precision": "float32"}),
        Case(**lstm | {"precision": "float32"}, batch_size=256),
        *(Case(**tuned, method=method, batch_size=256) for method in ("uni_ehr", "mmtm3", "daft3")),
        Case(kind="bootstrap", num_stays=11_914),
        Case(kind="first_step", precision="bfloat16"),
    ]


def _tpu() -> list[Case]:
    """Return the cases for one TPU chip, the most important first. PyTorch and the GPU's kernels do not run there."""
    lstm: dict = {"kind": "lstm", "precision": "bfloat16", "max_buckets": 4, "num_batches": 8}
    cases = [
        Case(kind="rates"),
        Case(**lstm),
        Case(**lstm, batch_size=256),
        Case(**_BF16),
        Case(**_BF16, batch_size=256, cxr_share=1.0),
        *_on_accelerators(),
        Case(**_BF16, method="uni_cxr", batch_size=256, cxr_share=1.0),
        Case(kind="bootstrap", num_stays=11_914),
        Case(kind="first_step", precision="bfloat16"),
    ]
    return [dataclasses.replace(case, peers=()) for case in cases]


def _on_accelerators() -> list[Case]:
    """Return the cases of a run's other costs: launches, the epoch loop, parts, trials of a sweep, reading."""
    alone: dict = _BF16 | {"peers": ()}
    return [
        Case(kind="trace", **alone),
        Case(kind="feed", **alone | {"num_batches": 32}, placement="device"),
        Case(kind="feed", **alone | {"num_batches": 32}, placement="device", batch_size=256),
        Case(kind="parts", **alone),
        Case(kind="trials", **alone, lanes=1),
        Case(kind="trials", **alone, lanes=10),
        Case(kind="reading", peers=()),
        Case(kind="reading", peers=(), batch_size=256),
        Case(kind="feed", **alone | {"num_batches": 32}, batch_size=256),
    ]


_TINY: dict = {
    "num_stays": 300,
    "batch_size": 4,
    "cxr_share": 0.5,
    "timestep_h": 4.0,
    "max_buckets": 1,
    "num_batches": 2,
    "resize_px": 32,
    "crop_px": 32,
    "sizes": (("ehr_hidden", 8), ("fusion_hidden", 8), ("resnet_stage_sizes", (1, 1)), ("resnet_width", 4)),
}


def _tiny() -> list[Case]:
    """Return every kind of case but 'sweep', tiny, to check in seconds that each runs. The numbers mean nothing."""
    kinds = [Case(kind=kind, **_TINY) for kind in ("step", "feed", "lstm", "first_step", "parts", "trials")]
    kinds += [Case(kind=kind, **_TINY) for kind in ("rates", "trace", "reading", "hourly")]
    kinds.append(Case(kind="dispatch", **_TINY, repeats=2))
    kinds.append(Case(kind="feed", **_TINY, placement="device"))
    return [*kinds, Case(kind="bootstrap", num_stays=500, repeats=5)]


def _devices() -> list[Case]:
    """Return the cases that divide one batch over 1, 2 and 8 devices, by pmap and shard_map.

    The X-rays are small, so that the cost of dividing is visible on devices that one CPU simulates.
    """
    one = Case(batch_size=64, cxr_share=0.25, resize_px=64, crop_px=64, max_buckets=1, num_batches=2, peers=())
    return [dataclasses.replace(one, num_devices=n, parallel=mode) for n in (1, 2, 8) for mode in ("pmap", "shard_map")]


def _dispatch() -> list[Case]:
    """Return the cases that compare a call of a step in one process, by pmap and by shard_map, with a call in two."""
    return [Case(kind="dispatch", peers=(), parallel=mode) for mode in ("pmap", "shard_map")]


def _growth() -> list[Case]:
    """Return the cases for a step's parts and for its growth with time steps, rows and X-rays, one at a time."""
    shared: dict = {"max_buckets": 1, "num_batches": 2, "peers": ()}
    lengths = [Case(method="uni_ehr", timestep_h=hours, **shared) for hours in (4.0, 2.0, 1.0)]
    stays = Case(method="uni_ehr", batch_size=32, **shared)
    shares = [Case(cxr_share=share, **shared) for share in (0.19, 0.5, 1.0)]
    return [*lengths, stays, Case(kind="parts", **shared), *shares]


_DEMO_STAYS = 1500  # of configs/demo.py


def _sweeps() -> list[Case]:
    """Return the cases that compare many trials with one: by their steps alone, and by whole commands."""
    return [
        Case(kind="trials", max_buckets=1, num_batches=2, peers=()),
        Case(kind="sweep", method="early", num_trials=64, num_stays=_DEMO_STAYS),
        Case(kind="sweep", num_epochs=2, num_stays=_DEMO_STAYS),
    ]


def _hourly() -> list[Case]:
    """Return the cases that compare all hours of a stay in one pass with its prefixes, ours and in PyTorch."""
    shared: dict = {"kind": "hourly", "num_stays": 2000, "peers": ("torch_tuned",)}
    return [Case(**shared, method="uni_ehr", num_batches=24), Case(**shared, num_batches=6, repeats=3)]


def _methods() -> list[Case]:
    """Return the cases for the training step of each of the paper's methods."""
    names = ("uni_ehr", "uni_cxr", "joint", "medfuse", "mmtm3", "mmtm4", "daft3", "daft4")
    return [Case(method=name, max_buckets=1, num_batches=2, peers=("torch_released",)) for name in names]


# name -> (cases, seconds after which no further case starts, or None for no limit)
PRESETS = {
    "cpu": (_cpu, 480.0),
    "gpu": (_gpu, 540.0),
    "tpu": (_tpu, 540.0),
    "h200": (_gpu, 540.0),  # the older name of 'gpu'
    "devices": (_devices, None),
    "dispatch": (_dispatch, None),
    "growth": (_growth, None),
    "hourly": (_hourly, None),
    "methods": (_methods, None),
    "sweeps": (_sweeps, None),
    "tiny": (_tiny, None),
}
PLATFORMS = {"gpu": "gpu", "h200": "gpu", "tpu": "tpu"}  # where these presets run; the others run anywhere


def preset(name: str) -> tuple[list[Case], float | None]:
    """Return a preset's cases and its time budget in seconds; UserError for an unknown name."""
    check_choice("--preset", name, PRESETS)
    make, budget_s = PRESETS[name]
    return make(), budget_s


def shrink(case: Case) -> Case:
    """Return the case at sizes that a CPU runs in seconds, to check that it runs. Its numbers mean nothing."""
    if case.kind == "rates":
        return case
    if case.kind in ("bootstrap", "sweep"):
        return dataclasses.replace(case, num_stays=500 if case.kind == "bootstrap" else 200)
    kept = {"cxr_share": case.cxr_share, "batch_size": min(case.batch_size, 8), "num_stays": 300}
    stages = (("resnet_stage_sizes", (1, 1, 1, 1)),)  # mmtm3 and daft3 fuse after the third
    return dataclasses.replace(case, **_TINY | kept | {"sizes": tuple((dict(_TINY["sizes"]) | dict(stages)).items())})


def to_json(case: Case) -> str:
    """Return the case as JSON, for a process of its own."""
    return json.dumps(dataclasses.asdict(case))


def from_json(text: str) -> Case:
    """Return the case that `to_json` wrote."""
    return Case(**{name: _tuples(value) for name, value in json.loads(text).items()})


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
