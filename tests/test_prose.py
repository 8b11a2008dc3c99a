"Numbers in the prose of an article are those of its tables."

import json
import re
from pathlib import Path

import numpy as np
import pytest

from spectral_nb.base.files import read_table

ROOT = Path(__file__).parent.parent
ARTICLES = [*sorted((ROOT / "nbs").glob("1?_*.ipynb")), ROOT / "nbs" / "index.ipynb"]
NO_RESULT = (
    r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}|[Ss]ections? [\d., and]*\d|Python \d\.\d+|Apache 2\.0|or later \(3\.11"
)


def prose_numbers(notebook: dict) -> list[str]:
    "Decimals in the markdown before the limits (which quote what others found); formulas, code and links apart."
    text = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```", "", text.split("## Limits")[0], flags=re.S)
    return re.findall(r"(?<![\w.])-?\d+\.\d+(?![\d.]*\w)", re.sub(NO_RESULT, "", text))


def shown_numbers(notebook: dict, section: str) -> np.ndarray:
    "Sizes of all numbers that the outputs show, and of those of the section's committed claims."
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    shown = [{k: v for k, v in o.get("data", {}).items() if not k.startswith("image")} for o in outputs]
    text = json.dumps([*shown, *(o.get("text") for o in outputs)])
    found = [float(x) for x in re.findall(r"\d+\.\d+|\d+", text)]
    claims = ROOT / "data" / "claims"
    files = [claims / f"{section}.parquet", *(claims / "real" / f"{section}{part}.parquet" for part in ("", "_tuning"))]
    tables = [read_table(f) for f in files if f.is_file()]
    columns = [t[c].dropna().to_numpy(float) for t in tables for c in t.select_dtypes("number")]
    return np.abs(np.concatenate([np.array(found), *columns]))


def unsaid(numbers: list[str], values: np.ndarray) -> list[str]:
    "Numbers that nothing shown rounds to, whatever its sign: prose says which way."

    def told(number: str) -> bool:
        near = np.abs(np.round(values, len(number.split(".")[1])) - abs(float(number))) < 1e-9
        return bool(near.any())

    return [n for n in numbers if not told(n)]


@pytest.mark.parametrize("path", ARTICLES, ids=lambda p: p.stem)
def test_numbers_in_prose_are_those_of_the_tables(path):
    notebook = json.loads(path.read_text())
    assert not unsaid(prose_numbers(notebook), shown_numbers(notebook, path.stem.split("_", 1)[-1]))


def test_a_number_that_no_table_has_is_found():
    article = dict(
        cells=[dict(cell_type="markdown", source=["Heads carry 0.76 of it (arXiv 2410.00340), section 5.1."])]
    )
    assert prose_numbers(article) == ["0.76"]
    assert unsaid(["0.76"], np.array([0.7598])) == [] and unsaid(["0.76"], np.array([0.7498, 10.76])) == ["0.76"]
