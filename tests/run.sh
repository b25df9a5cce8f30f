#!/usr/bin/env bash
# The whole test command: environment, style, types, tests. `--full` adds the tests that take minutes;
# other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh dev

ruff check .
ruff format --check .
mypy
export DS_ACCELERATOR=cpu HF_HUB_DISABLE_TELEMETRY=1
python -m pytest --numprocesses 2 --dist loadfile "$@"
