# Sourced by quickstart and test: make .venv and install taperlit into it, with the extras named in $1.

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
extras=$1
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "there is no $python; install Python 3.10 to 3.13 or set PYTHON"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' ||
    fail "$("$python" --version) will not do; set PYTHON to a Python 3.10 to 3.13"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; install it (on Debian: apt install python3-venv)"
free_kib=$(df -Pk "$root" | awk 'NR == 2 {print $4}')

venv=$root/.venv
wanted=$(cat "$root/pyproject.toml" "$root/tools/constraints.txt" | cksum)
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    [ "$free_kib" -gt 3000000 ] || fail "$root has $((free_kib / 1024)) MiB free; the installation needs 3 GB"
    echo "making $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "cannot make $venv"
fi
installed() { [ "$(cat "$venv/installed-$1" 2>/dev/null)" = "$wanted" ]; }
if ! installed "$extras" && ! installed test; then # test has what the others have
    echo "installing taperlit[$extras] and what it needs"
    # Python compiles what it imports; to compile all of it here takes a minute more, and helps where it may keep nothing.
    compile=${PYTHONDONTWRITEBYTECODE:+--compile}
    "$venv/bin/python" -m pip install -q "${compile:---no-compile}" -c "$root/tools/constraints.txt" -e "$root[$extras]" ||
        fail "the installation failed; pip says why above"
    echo "$wanted" >"$venv/installed-$extras"
fi
