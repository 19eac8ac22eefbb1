#!/usr/bin/env bash
# The small tests, or those given, in a new environment of the lowest versions in pyproject.toml.
# Without ONNX, whose extra needs a newer torch, and Ray.
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
used = [*extras["peft"], *extras["medical"], *extras["transformers"]]
for requirement in project["dependencies"] + used:
    if found := re.match(r"([\w-]+)>=([\d.]+)", requirement):
        print("{}=={}".format(*found.groups()))
PYTHON
"$environment/bin/pip" install -q -c "$environment/lowest.txt" -e '.[peft,medical]' \
  'highdicom>=0.28' 'pytest>=8' 'hypothesis>=6'
if [ $# = 0 ]; then
  set -- tests/backbones tests/data tests/methods tests/test_{artifact,cli,config,stored}.py
fi
# an old torch compiles a step in parts
"$environment/bin/python" -m pytest -q -p no:cacheprovider -k 'not compiles_whole' "$@"
