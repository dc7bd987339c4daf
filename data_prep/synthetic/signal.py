"""How labels depend on a synthetic patient's latents, and the AUROC that no model can exceed.

A stay has VITAL_LATENTS, which drive its events, and IMAGE_LATENTS, which drive its X-ray; all are independent and
standard normal. A label is Bernoulli(p) with

    p = sigmoid(bias + SCALE * c),   u_v = a unit vector . vital latents,   u_x = a unit vector . image latents
    c = u_v             the vitals alone decide                ("vitals")
    c = u_x             the X-ray alone decides                ("cxr")
    c = (u_v+u_x)/2^½   each modality contributes half         ("sum")
    c ~ min(u_v, u_x)   both must be high                      ("and")

The best possible score is therefore known: p with both modalities, E[p | vital latents] without an X-ray. It is
computed from the latents; the noise of the records (events.Signal.patient_sd, cxr.IMAGE_NOISE) costs about 0.01 AUROC.

With a planted change (tree.write), the label of the phenotype CHANGED is whether the effusion grew from the first to
the last X-ray of the stay. It depends on nothing else, so only the two X-rays together reveal it.

Shapes: N stays, V vital latents, E image latents, K labels, Q quadrature nodes.
"""

import dataclasses

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from data_prep.synthetic.draw import IMAGE_LATENTS
from medfuse_jax import schema

VITAL_LATENTS = (
    "tachycardia",
    "hypotension",
    "tachypnoea",
    "hypoxaemia",
    "fever",
    "hyperglycaemia",
    "acidosis",
    "coma",
)
SCALE = 2.5  # standard deviation of a logit; gives a best AUROC of about 0.9 at these prevalences
_MIN_MEAN, _MIN_STD = -1 / np.sqrt(np.pi), np.sqrt(1 - 1 / np.pi)  # of the smaller of two standard normals
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one label depends on the latents.

    prevalence: in the whole cohort; for the phenotypes the train column of the paper's Table 4.
    vitals, image: latent -> weight (scaled to a unit vector).
    both: how a label of both modalities combines them, 'sum' or 'and'.
    """

    prevalence: float
    vitals: dict[str, float] = dataclasses.field(default_factory=dict)
    image: dict[str, float] = dataclasses.field(default_factory=dict)
    both: str = "sum"

    @property
    def group(self) -> str:
        """Which of the module's four formulas applies: 'vitals', 'cxr', 'sum' or 'and'."""
        if not self.image:
            return "vitals"
        return self.both if self.vitals else "cxr"


PHENOTYPE_RULES = {  # by CCS category
    157: Rule(0.269, {"acidosis": 1.0, "hypotension": 0.6}),
    109: Rule(0.056, {"coma": 1.0}),
    100: Rule(0.074, {"tachycardia": 1.0}, {"haze": 1.0, "heart": 0.6}),
    106: Rule(0.326, {"tachycardia": 1.0}, {"heart": 1.0}),
    158: Rule(0.206, {"acidosis": 1.0}, {"effusion": 1.0}),
    127: Rule(0.143, image={"lucency": 1.0, "nodule": 0.5}),
    238: Rule(0.189, image={"device": 1.0, "effusion": 0.6}),
    105: Rule(0.100, image={"device": 1.0}),
    108: Rule(0.255, image={"heart": 1.0, "effusion": 0.6}),
    101: Rule(0.311, image={"heart": 1.0, "device": 0.6}),
    50: Rule(0.114, {"hyperglycaemia": 1.0, "acidosis": 0.5}),
    49: Rule(0.172, {"hyperglycaemia": 1.0}),
    53: Rule(0.404, {"hypotension": -1.0, "hyperglycaemia": 0.8}),
    98: Rule(0.418, {"hypotension": -1.0}),
    55: Rule(0.371, {"acidosis": 1.0, "coma": 0.6}),
    153: Rule(0.070, {"tachycardia": 1.0, "hypotension": 0.8}),
    99: Rule(0.215, {"hypotension": -1.0}, {"heart": 1.0}),
    151: Rule(0.125, {"coma": 1.0}, {"effusion": 1.0}),
    133: Rule(0.095, image={"haze": 1.0}),
    134: Rule(0.048, {"tachypnoea": 1.0}, {"device": 1.0}),
    130: Rule(0.067, image={"effusion": 1.0, "lucency": 0.8}),
    122: Rule(0.127, image={"nodule": 1.0, "haze": 0.6}),
    131: Rule(0.160, {"hypoxaemia": 1.0, "tachypnoea": 0.8}, {"haze": 1.0}, "and"),
    2: Rule(0.158, {"fever": 1.0, "tachycardia": 0.6}),
    249: Rule(0.123, {"hypotension": 1.0, "acidosis": 0.5}, {"heart": 1.0, "haze": 0.6}, "and"),
}
MORTALITY_RULE = Rule(0.12, {"hypotension": 1.0, "coma": 0.8, "hypoxaemia": 0.6}, {"haze": 1.0, "effusion": 0.6})
RULES = {
    "pheno": tuple(PHENOTYPE_RULES[p.ccs] for p in schema.PHENOTYPES),
    "mortality": (MORTALITY_RULE,),
}


CHANGED = 130  # by CCS category: "Pleurisy; pneumothorax; pulmonary collapse"


def plant_change(rng: np.random.Generator, planted: dict[str, np.ndarray]) -> np.ndarray:
    """Draw whether each stay's effusion grew, bool [N], and write that into the labels and probabilities of CHANGED.

    planted: from `cohort.draw_stays`.
    """
    k = [p.ccs for p in schema.PHENOTYPES].index(CHANGED)
    grew_N = rng.random(len(planted["pheno_label"])) < 0.5
    planted["pheno_label"][:, k] = grew_N
    for name in ("both", "cxr_only"):
        planted["pheno"][name][:, k] = grew_N
    planted["pheno"]["ehr_only"][:, k] = 0.5
    return grew_N


def draw_latents(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the vital latents [num, V] and image latents [num, E] of `num` stays."""
    return rng.standard_normal((num, len(VITAL_LATENTS))), rng.standard_normal((num, len(IMAGE_LATENTS)))


def projection(weights: dict[str, float], names: tuple[str, ...], latents: np.ndarray) -> np.ndarray:
    """Return the latents' projection on the direction of the weights [N], standard normal; zeros without weights."""
    vector = np.zeros(len(names))
    for name, weight in weights.items():
        vector[names.index(name)] = weight
    return latents @ (vector / np.linalg.norm(vector)) if weights else np.zeros(len(latents))


def logit(rule: Rule, u_v: np.ndarray, u_x: np.ndarray) -> np.ndarray:
    """Return the label's logit without its bias."""
    combine = {
        "vitals": lambda: u_v + 0 * u_x,  # in the broadcast shape of both
        "cxr": lambda: u_x + 0 * u_v,
        "sum": lambda: (u_v + u_x) / np.sqrt(2),
        "and": lambda: (np.minimum(u_v, u_x) - _MIN_MEAN) / _MIN_STD,
    }
    return SCALE * combine[rule.group]()


def find_bias(rule: Rule) -> float:
    """Return the bias that gives the rule its prevalence."""
    logit_QQ = logit(rule, _NODES[:, None], _NODES[None, :])
    weight_QQ = _WEIGHTS[:, None] * _WEIGHTS[None, :]
    return brentq(lambda bias: (weight_QQ * expit(logit_QQ + bias)).sum() - rule.prevalence, -40.0, 40.0)


def probabilities(task: str, vitals_NV: np.ndarray, cxr_NE: np.ndarray) -> dict[str, np.ndarray]:
    """Return the true label probabilities, each [N, K], given 'both', 'ehr_only' and 'cxr_only' latents."""
    by_input = {"both": [], "ehr_only": [], "cxr_only": []}
    for rule in RULES[task]:
        u_v = projection(rule.vitals, VITAL_LATENTS, vitals_NV)
        u_x = projection(rule.image, IMAGE_LATENTS, cxr_NE)
        bias = find_bias(rule)
        by_input["both"].append(expit(logit(rule, u_v, u_x) + bias))
        by_input["ehr_only"].append(expit(logit(rule, u_v[:, None], _NODES[None, :]) + bias) @ _WEIGHTS)
        by_input["cxr_only"].append(expit(logit(rule, _NODES[None, :], u_x[:, None]) + bias) @ _WEIGHTS)
    return {name: np.stack(columns, axis=1) for name, columns in by_input.items()}


def expected_auroc(true_p: np.ndarray, score: np.ndarray) -> float:
    """Return the expected AUROC of `score` [N] for labels that are Bernoulli(true_p [N]).

    Every stay counts as a positive of weight p and a negative of weight 1 - p.
    """
    label = np.repeat([1, 0], len(true_p))
    weight = np.concatenate([true_p, 1 - true_p])
    # Rounding makes scores tie that are equal but for floating-point error.
    return float(roc_auc_score(label, np.tile(score.round(12), 2), sample_weight=weight))


def best_auroc(task: str, by_input: dict[str, np.ndarray], has_cxr_N: np.ndarray) -> dict:
    """Return the best expected AUROC on these stays, per label and macro.

    by_input: from `probabilities`. has_cxr_N: bool, the stays with an X-ray. The result has 'all' (every stay) and
    'paired' (those with an X-ray). In 'all', 'both' uses the 'ehr_only' score of stays without an X-ray. A score is
    None with fewer than two stays.
    """
    available = np.where(has_cxr_N[:, None], by_input["both"], by_input["ehr_only"])
    scores = {
        "all": (slice(None), {"both": available, "ehr_only": by_input["ehr_only"]}),
        "paired": (has_cxr_N, by_input),
    }
    report: dict = {"labels": list(schema.TASKS[task].labels), "groups": [rule.group for rule in RULES[task]]}
    for subset, (rows, by_modality) in scores.items():
        true_p = by_input["both"][rows]
        report[subset] = {"num_stays": len(true_p)}
        for modality, score in by_modality.items():
            if len(true_p) < 2:
                report[subset][modality] = {"macro": None, "per_label": None}
                continue
            per_label = [expected_auroc(true_p[:, k], score[rows][:, k]) for k in range(true_p.shape[1])]
            report[subset][modality] = {"macro": float(np.mean(per_label)), "per_label": per_label}
    return report
