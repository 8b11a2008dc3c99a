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


def shown_numbers(notebook: dict, section: str) -> tuple[str, np.ndarray]:
    "The text of all outputs, and every number of the section's committed tables."
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    shown = [{k: v for k, v in o.get("data", {}).items() if not k.startswith("image")} | o for o in outputs]
    text = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in shown])
    claims = ROOT / "data" / "claims"
    files = [claims / f"{section}.parquet", *(claims / "real").glob(f"{section}*.parquet")]
    tables = [read_table(f) for f in files if f.is_file()]
    columns = [t[c].dropna().to_numpy(float) for t in tables for c in t.select_dtypes("number")]
    return text, np.concatenate(columns) if columns else np.zeros(0)


def unsaid(numbers: list[str], text: str, values: np.ndarray) -> list[str]:
    "Numbers that no output shows and that no value of the tables rounds to."

    def told(number: str) -> bool:
        near = np.abs(np.round(values, len(number.split(".")[1])) - float(number)) < 1e-9
        return number in text or bool(near.any())

    return [n for n in numbers if not told(n)]


@pytest.mark.parametrize("path", ARTICLES, ids=lambda p: p.stem)
def test_numbers_in_prose_are_those_of_the_tables(path):
    notebook = json.loads(path.read_text())
    text, values = shown_numbers(notebook, path.stem.split("_", 1)[-1])
    assert not unsaid(prose_numbers(notebook), text, values)


def test_a_number_that_no_table_has_is_found():
    article = dict(
        cells=[dict(cell_type="markdown", source=["Heads carry 0.76 of it (arXiv 2410.00340), section 5.1."])]
    )
    assert prose_numbers(article) == ["0.76"]
    assert unsaid(["0.76"], "", np.array([0.7598])) == [] == unsaid(["0.76"], "lost 0.76 of", np.zeros(0))
    assert unsaid(["0.76"], "", np.array([0.7498])) == ["0.76"]
