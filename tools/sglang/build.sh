#!/bin/sh
# Builds .venv-sglang: a real SGLang server that serves on a CPU. Does nothing when it is up to date.
# About 3 GB and two to five minutes. Another Python: PYTHON=...; another folder: SGLANG_VENV=...
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
venv=${SGLANG_VENV:-$root/.venv-sglang}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
stamp=$venv/.stepguard-built
# What decides its content; the words of this script do not.
recipe="$(cat "$here"/*.txt "$here"/*.py "$here"/sgl_kernel/*.py | sha256sum | cut -d ' ' -f 1) $torch"

say() { echo "sglang: $*"; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$recipe" ]; then
    say "$venv is up to date"
    exit 0
fi
command -v "$python" >/dev/null || { say "no $python here; set PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
free_kb=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print $4 }')
if [ "$free_kb" -lt 6000000 ]; then
    say "needs 6 GB of free disk while it builds; $((free_kb / 1000000)) GB are free beside $venv" >&2
    exit 1
fi

say "1/5 a fresh environment in $venv"
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -qq --upgrade pip
# torch comes first and alone: pip prefers the CPU build where the index offers one, and nothing later swaps it.
say "2/5 torch for the CPU"
"$venv/bin/python" -m pip install -qq "$torch"
"$venv/bin/python" -W ignore -c '
import sys, torch
if torch.version.cuda is not None:
    sys.exit("sglang: pip brought a CUDA torch; name an index with the CPU build: "
             "PIP_EXTRA_INDEX_URL=<index> make sglang")'
say "3/5 what SGLang imports (the longest part)"
"$venv/bin/python" -m pip install -qq -r "$here/requirements.txt"
say "4/5 SGLang itself"
"$venv/bin/python" -m pip install -qq --no-deps -r "$here/requirements-bare.txt"
say "5/5 two shims, and a look at what came"
"$venv/bin/python" "$here/prepare.py"
SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -c 'import sglang.launch_server' >/dev/null
echo "$recipe" >"$stamp"
say "done: $(du -sh "$venv" | cut -f 1) in $venv"
