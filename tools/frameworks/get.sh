#!/usr/bin/env bash
# The frameworks' own source, for the tests in tests/frameworks to be held against: into .frameworks/<name>.
#   tools/frameworks/get.sh            the releases of tools/frameworks/versions.txt, from PyPI, and what their base
#                                      classes import (needs.txt): nothing is installed into .venv
#   tools/frameworks/get.sh newest     today's newest releases of the same: then run tests/frameworks, and when they
#                                      are green write what it printed into versions.txt
#   tools/frameworks/get.sh checkouts  also slime and prime-rl, which have no release: from GitHub, or from
#                                      $FRAMEWORK_SOURCES/<name>, a git repository, where that is set; and the
#                                      router that a run of slime starts
# CI takes the releases that are written down, so that it is not another project's release that turns it red.
set -euo pipefail
cd "$(dirname "$0")/../.."
which=${1:-}
case $which in "" | newest | checkouts) ;; *) echo "get.sh: $which: nothing, newest or checkouts" >&2 && exit 2 ;; esac
python=.venv/bin/python
tools=tools/frameworks
mkdir -p .frameworks
while read -r name release; do
  [ "$which" != newest ] || release=${release%%==*}
  rm -rf ".frameworks/$name" .frameworks/wheel
  "$python" -m pip download --quiet --no-deps --prefer-binary --dest .frameworks/wheel "$release"
  packed=$(echo .frameworks/wheel/*)
  case $packed in
    *.whl) "$python" -m zipfile -e "$packed" ".frameworks/$name" ;;
    *) mkdir -p ".frameworks/$name" && tar xzf "$packed" --strip-components=1 -C ".frameworks/$name" ;; # no wheel
  esac
  basename "${packed%.tar.gz}" | cut -d- -f2 >".frameworks/$name/VERSION"
  echo "$name $(cat ".frameworks/$name/VERSION")"
done < <(grep -v '^#' "$tools/versions.txt")
rm -rf .frameworks/wheel .frameworks/needs
# An older wandb, which writes its log otherwise; what else it needs is in .venv.
rm -rf .frameworks/older-wandb
"$python" -m pip install --quiet --no-deps --target .frameworks/older-wandb wandb==0.29.0 sentry-sdk==2.20.0
# What has to be there to import their base classes without a GPU; torch and ray are in .venv.
"$python" -m pip install --quiet --no-deps --target .frameworks/needs -r "$tools/needs.txt"
[ "$which" = checkouts ] || exit 0
"$python" -m pip install --quiet --no-deps --upgrade --target .frameworks/needs sglang-router==0.3.2 setproctitle==1.3.8
for repository in THUDM/slime PrimeIntellect-ai/prime-rl; do
  name=${repository#*/}
  rm -rf ".frameworks/$name" .frameworks/clone
  from=https://github.com/$repository
  [ -z "${FRAMEWORK_SOURCES:-}" ] || from=$FRAMEWORK_SOURCES/$name
  git clone --quiet --depth 1 "$from" .frameworks/clone
  mkdir ".frameworks/$name"
  git -C .frameworks/clone archive HEAD | tar x -C ".frameworks/$name"
  git -C .frameworks/clone log -1 --format='%h of %cs' >".frameworks/$name/VERSION"
  rm -rf .frameworks/clone
done
