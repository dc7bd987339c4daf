"""The benchmark's cases and presets.

A case's contenders take turns on the same batches, so that other load on the machine affects them all equally.
"""

import dataclasses

from medfuse_jax.runtime.errors import check_choice

PEERS = ("torch_released", "torch_tuned")


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    kind: the module of this folder that measures it. cxr_share: fraction of paired stays; it sets the number of
    X-ray slots in a batch. placement: config.placement, for 'feed'. parallel: 'pmap' or 'shard_map'. num_batches:
    batches per repeat, at equal quantiles of their longest stay. peers: PyTorch variants to compare with, if torch
    is installed. sizes: model fields that differ from the released sizes. num_trials: for 'trials' and 'sweep'.
    num_epochs: for 'sweep'.
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

    @property
    def name(self) -> str:
        """The case's name, unique within its preset."""
        if self.kind == "bootstrap":
            return f"bootstrap N={self.num_stays}"
        if self.kind == "sweep":
            return f"sweep {self.method} {self.num_trials} trials"
        parts = [self.kind, self.method, f"B={self.batch_size}"]
        if self.method != "uni_ehr" and self.kind != "lstm":
            parts.append(f"{self.cxr_share:.0%} paired")
        parts += [f"{self.timestep_h:g} h", self.precision]
        if self.kind == "feed":
            parts.append(self.placement)
        if self.kind == "trials":
            parts.append(f"{self.num_trials} trials")
        if self.num_devices > 1:
            parts.append(f"{self.num_devices} devices")
        if self.parallel != "pmap":
            parts.append(self.parallel)
        return " ".join(parts)


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
    ]


def _h200() -> list[Case]:
    """Return the cases for one large GPU, the headline first: the time budget may drop the last ones."""
    bf16: dict = {"precision": "bfloat16", "max_buckets": 1, "num_batches": 8, "repeats": 7, "warm_up": 2}
    return [
        Case(batch_size=256, cxr_share=1.0, **bf16),
        Case(batch_size=16, **bf16 | {"num_batches": 16}),
        Case(method="uni_cxr", batch_size=256, cxr_share=1.0, **bf16, peers=("torch_tuned",)),
        Case(kind="feed", batch_size=256, **bf16 | {"num_batches": 32}),
        Case(kind="feed", batch_size=256, **bf16 | {"num_batches": 32}, placement="device"),
        Case(kind="lstm", batch_size=256, **bf16 | {"precision": "float32", "max_buckets": 4}),
        Case(kind="lstm", batch_size=16, **bf16 | {"precision": "float32", "max_buckets": 4}),
        Case(kind="bootstrap", num_stays=11_914),
        Case(kind="trials", **bf16, peers=()),
        Case(batch_size=256, **bf16),
        Case(batch_size=16, cxr_share=1.0, **bf16 | {"num_batches": 16}),
        Case(kind="lstm", batch_size=256, **bf16 | {"max_buckets": 4}),
        Case(method="uni_ehr", batch_size=256, **bf16, peers=("torch_tuned",)),
        Case(method="mmtm3", batch_size=256, **bf16, peers=("torch_tuned",)),
        Case(method="daft3", batch_size=256, **bf16, peers=("torch_tuned",)),
        Case(kind="first_step", precision="bfloat16"),
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
    kinds.append(Case(kind="feed", **_TINY, placement="device"))
    return [*kinds, Case(kind="bootstrap", num_stays=500, repeats=5)]


def _devices() -> list[Case]:
    """Return the cases that divide one batch over 1, 2 and 8 devices, by pmap and shard_map.

    The X-rays are small, so that the cost of dividing is visible on devices that one CPU simulates.
    """
    one = Case(batch_size=64, cxr_share=0.25, resize_px=64, crop_px=64, max_buckets=1, num_batches=2, peers=())
    return [dataclasses.replace(one, num_devices=n, parallel=mode) for n in (1, 2, 8) for mode in ("pmap", "shard_map")]


def _growth() -> list[Case]:
    """Return the cases for a step's parts and for its growth with time steps, rows and X-rays, one at a time."""
    shared: dict = {"max_buckets": 1, "num_batches": 2, "peers": ()}
    lengths = [Case(method="uni_ehr", timestep_h=hours, **shared) for hours in (4.0, 2.0, 1.0)]
    stays = Case(method="uni_ehr", batch_size=32, **shared)
    shares = [Case(cxr_share=share, **shared) for share in (0.19, 0.5, 1.0)]
    return [*lengths, stays, Case(kind="parts", **shared), *shares]


def _sweeps() -> list[Case]:
    """Return the cases that compare many trials with one: by their steps alone, and by whole commands."""
    return [
        Case(kind="trials", max_buckets=1, num_batches=2, peers=()),
        Case(kind="sweep", method="early", num_trials=64),
        Case(kind="sweep", num_epochs=2),
    ]


def _methods() -> list[Case]:
    """Return the cases for the training step of each of the paper's methods."""
    names = ("uni_ehr", "uni_cxr", "joint", "medfuse", "mmtm3", "mmtm4", "daft3", "daft4")
    return [Case(method=name, max_buckets=1, num_batches=2, peers=("torch_released",)) for name in names]


# name -> (cases, seconds after which no further case starts, or None for no limit)
PRESETS = {
    "cpu": (_cpu, 480.0),
    "h200": (_h200, 400.0),
    "devices": (_devices, None),
    "growth": (_growth, None),
    "methods": (_methods, None),
    "sweeps": (_sweeps, None),
    "tiny": (_tiny, None),
}


def preset(name: str) -> tuple[list[Case], float | None]:
    """Return a preset's cases and its time budget in seconds; UserError for an unknown name."""
    check_choice("--preset", name, PRESETS)
    make, budget_s = PRESETS[name]
    return make(), budget_s
