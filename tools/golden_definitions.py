"""Write tests/golden/definition_hashes.json: the hash of what defines the study of each sweep file.

Run: python tools/golden_definitions.py      only after a sweep file was changed on purpose

A study on disk goes on only under the definition that it began with. When a hash changes and its sweep file did not,
a setting was renamed or a default was changed, and studies that users have begun would be refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from fintx.config import load
from fintx.config.schema import StudySpec
from fintx.study import study_file

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "golden" / "definition_hashes.json"


def definition_hash(spec: StudySpec) -> str:
    """The hash that study.json holds, but without the versions of the libraries, which differ by machine."""
    definition = study_file.definition(spec)
    return study_file.definition_hash({key: definition[key] for key in definition if not key.startswith("software.")})


def hashes() -> dict[str, str]:
    """File name → hash; a manual file's studies by its name and theirs."""
    by_file = {}
    for path in sorted((ROOT / "sweeps").glob("*.toml")):
        if load.is_manual(path):
            by_file |= {f"{path.name}: {spec.study.name}": definition_hash(spec) for spec in load.manual(path).values()}
        else:
            by_file[path.name] = definition_hash(load.study(path))
    return by_file


if __name__ == "__main__":
    FILE.write_text(json.dumps({"made by": "tools/golden_definitions.py", "hashes": hashes()}, indent=1) + "\n")
