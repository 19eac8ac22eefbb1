#!/usr/bin/env bash
# The small tests in a new environment of the lowest versions that pyproject.toml states.
# Left out: ONNX, which says of itself that it needs a newer torch, and Ray.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3.11 -m venv "$environment"
"$environment/bin/python" > "$environment/lowest.txt" <<'PYTHON'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["peft"] + extras["medical"]:
    name, version = re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
PYTHON
"$environment/bin/pip" install -q -c "$environment/lowest.txt" -e '.[peft,medical]' \
  'highdicom>=0.28' 'pytest>=8' 'hypothesis>=6'
"$environment/bin/python" -m pytest -q -p no:cacheprovider "${@:-tests}" \
  --ignore tests/test_export.py --ignore tests/test_demos.py --ignore tests/engine/test_suite.py
