"""Which build of the data a run was trained on and scored on, and how that differs between runs. Never imports jax."""

from collections.abc import Mapping

from medfuse_jax import schema

UNTIL_OUTTIME_NOTE = (
    "X-rays up to the end of the stay (--pairing=until_outtime): for comparison with the published mortality results "
    "alone."
)


def unusual(manifest: Mapping) -> dict[str, str]:
    """Return {'pairing': ...} if a dataset pairs stays with X-rays in another way than usual; else {}."""
    pairing = manifest.get("pairing") or schema.IN_WINDOW  # builds of earlier versions have no other
    return {} if pairing == schema.IN_WINDOW else {"pairing": pairing}


def note(described: Mapping) -> str:
    """Return the sentence that every table of such data has; '' if the pairing is the usual one.

    described: a manifest, data.json, or the 'data' of a result.
    """
    return UNTIL_OUTTIME_NOTE if described.get("pairing") == schema.UNTIL_OUTTIME else ""
