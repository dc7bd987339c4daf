"""What `stay.explain` finds out about one stay's score. Never imports jax.

Shapes: T time steps, F EHR channel, V variables, P images, C side of an image as the model sees it.
"""

import dataclasses

import numpy as np

from medfuse_jax import schema


@dataclasses.dataclass(frozen=True)
class Attribution:
    """One stay's score of one label, in logits, and what it rests on.

    baseline: the score of the same stay with average values instead of its own (see `stay.explain`). ehr_TF: the shares
    of the difference, gap: their sum minus it. image_PCC: how much the score falls without a part of an X-ray, and
    shown_PCC the X-rays' grey values in 0..1. hour: of the score, in an hourly task. timestep_h: hours per step.
    """

    stay_id: int
    task: str
    method: str
    label: str
    score: float
    baseline: float
    gap: float
    ehr_TF: np.ndarray
    image_PCC: np.ndarray
    shown_PCC: np.ndarray
    timestep_h: float
    hour: float | None = None

    @property
    def variables_TV(self) -> np.ndarray:
        """The shares by variable: the sum of its value, its classes and its mask."""
        places = [
            [c for c, name in enumerate(schema.CHANNELS) if _variable(name) == variable.name]
            for variable in schema.VARIABLES
        ]
        return np.stack([self.ehr_TF[:, columns].sum(1) for columns in places], axis=1)


def _variable(channel: str) -> str:
    first, _, second = channel.partition("->")
    return second if first == "mask" else first
