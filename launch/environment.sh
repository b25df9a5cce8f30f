# Make .venv if it is absent and install the project into it, with the versions of launch/constraints.txt.
# Sourced by quickstart.sh and tests/run.sh with the extras to install, e.g. `. launch/environment.sh dev`; started
# by itself it installs and does no more.
#
# LRPRETRAIN_PYTHON       the Python to use (default: the first of python3, python3.13 … that fits)
# LRPRETRAIN_TORCH_INDEX  a package index to take torch from, e.g. one with CPU builds

_extras=${1:-}
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DS_BUILD_OPS=0 # DeepSpeed builds its kernels when they are first used, not now
export PIP_DISABLE_PIP_VERSION_CHECK=1

_fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [ ! -x "$_root/.venv/bin/python" ]; then
    _python=
    for _candidate in ${LRPRETRAIN_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if _fits "$_candidate"; then
            _python=$_candidate
            break
        fi
    done
    if [ -z "$_python" ]; then
        echo "No Python 3.11 to 3.13 found. Install one, or name it in LRPRETRAIN_PYTHON." >&2
        exit 2
    fi
    echo "making .venv with $("$_python" --version)"
    if ! "$_python" -m venv "$_root/.venv"; then
        rm -rf "$_root/.venv"
        echo "$_python has no working venv module. On Debian: apt-get install python3-venv." >&2
        exit 2
    fi
fi

# Installing again is only needed when what is installed was written down differently. Extras have a note of
# their own beside that of the project, so that those who ask for less find it installed.
_wanted=$(cat "$_root/pyproject.toml" "$_root/launch/constraints.txt"; echo "${LRPRETRAIN_TORCH_INDEX:-}")
_note=$_root/.venv/installed
if [ "$(cat "$_note${_extras:+-$_extras}" 2>/dev/null)" != "$_wanted" ]; then
    echo "installing (torch is large: this can take minutes)"
    _pip=("$_root/.venv/bin/python" -m pip install --quiet --constraint "$_root/launch/constraints.txt")
    # torch first and alone: from its own index where one is named, and deepspeed's build looks for it.
    "${_pip[@]}" ${LRPRETRAIN_TORCH_INDEX:+--index-url "$LRPRETRAIN_TORCH_INDEX"} torch || exit
    "${_pip[@]}" --editable "$_root${_extras:+[$_extras]}" || exit
    for _written in "$_note" "$_note${_extras:+-$_extras}"; do
        printf '%s\n' "$_wanted" >"$_written"
    done
fi
PATH="$_root/.venv/bin:$PATH"
