"""The command that makes the tables of docs/phenotypes.md."""

from pathlib import Path

import pytest
import yaml
from raw_tables import stay, write_mimic_iv

from data_prep import compare_routes, icd_routes
from medfuse_jax import tasks

PAGE = Path(__file__).parent.parent / "docs/phenotypes.md"


def test_what_a_route_has_more_and_less_than_the_table(tmp_path):
    codes = [(0, "I2510", 10), (1, "4019", 9), (2, "U9999", 10), (3, "R571", 10)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(n) for n in range(4)], codes=codes)
    table = {p.name: {"id": p.ccs, "codes": []} for p in tasks.PHENOTYPES}
    table["Essential hypertension"]["codes"] = ["4019"]
    table["Shock"]["codes"] = ["R571", "U9999"]
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    lines = compare_routes.compare(iv, tmp_path / "table.yaml").splitlines()
    assert lines[0] == "4 stays, 100 labels; 1 stays and 1 codes in ICD-9, 3 stays and 3 codes in ICD-10."
    assert "| `gem` | 2 | 1 | 1 |" in lines and "| `gem, last row` | 3 | 0 | 1 |" in lines
    assert "No category by `gem`: U9999." in lines
    assert "| I2510 | 10 | 1 | 101 | - |" in lines and "| U9999 | 10 | 1 | - | 249 |" in lines
    (shock,) = (line for line in lines if line.startswith("| Shock"))
    assert shock.startswith("| Shock | 0.123 | 0.500 | **0.250** |")


def test_the_page_shows_what_the_command_prints(real_data):
    printed = compare_routes.compare(
        real_data / "mimic-iv-demo-2.2", real_data / "released/icd_9_10_definitions_2.yaml"
    ).splitlines()
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    numbers = {line.split("|")[1].strip(): line.split("|")[2:] for line in shown}
    routes = ["`gem`", "`gem, last row`", "`gem, every reading`"]
    routes += ["`HCUP CCS`"] if icd_routes.hcup_route() else []
    for route in routes:
        (line,) = (line for line in printed if line.startswith(f"| {route} |"))
        assert numbers[route] == line.split("|")[2:], route
    for name in (
        "Shock",
        "Cardiac dysrhythmias",
        "Disorders of lipid metabolism",
        "Diabetes mellitus with complications",
    ):
        (line,) = (line for line in printed if line.startswith(f"| {name} |"))
        columns = len(line.split("|")) - 3
        cells = [cell.strip(" *") for cell in line.split("|")[2:]][:columns]
        assert [cell.strip() for cell in numbers[name]][:columns] == cells, name


def test_what_the_command_wants_is_said():
    from absl import flags

    from medfuse_jax.errors import UserError

    values = flags.FlagValues()
    compare_routes.define_flags(values)
    assert {"mimic_iv", "phenotypes"} <= set(values)
    with pytest.raises(UserError, match="nowhere"):
        compare_routes.compare("nowhere", "nowhere.yaml")
