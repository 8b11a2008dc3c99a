"Fails if cleaning or exporting the notebooks changes a file: `check_sync.py <bin folder of the environment>`."

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def state() -> dict[str, str]:
    files = sorted([*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("spectral_nb/**/*.py")])
    return {
        str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if ".ipynb_checkpoints" not in f.parts
    }


def main(bin_folder: str) -> int:
    before = state()
    for tool in ("nbdev_clean", "nbdev_export"):
        subprocess.run([ROOT / bin_folder / tool], check=True, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    after = state()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        print(
            "Not clean or not in sync with the notebooks (cleaned and exported now; commit them):", *changed, sep="\n  "
        )
    else:
        print(f"{len(after)} notebooks and modules are clean and in sync.")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
