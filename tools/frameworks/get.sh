#!/usr/bin/env bash
# The frameworks' own source, for the tests in tests/frameworks to be held against: into .frameworks/<name>.
#   tools/frameworks/get.sh            the newest releases on PyPI of those that are there, and what their base classes
#                                      import: nothing is installed into .venv
#   tools/frameworks/get.sh checkouts  also slime, miles and prime-rl, which have none: from GitHub, or from
#                                      $FRAMEWORK_SOURCES/<name>, a git repository, where that is set
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
mkdir -p .frameworks
for name in verl areal skyrl openrlhf; do
  rm -rf ".frameworks/$name" .frameworks/wheel
  "$python" -m pip download --quiet --no-deps --only-binary :all: --dest .frameworks/wheel "$name"
  wheel=$(echo .frameworks/wheel/*.whl)
  "$python" -m zipfile -e "$wheel" ".frameworks/$name"
  basename "$wheel" | cut -d- -f2 >".frameworks/$name/VERSION"
done
rm -rf .frameworks/wheel .frameworks/needs
# What has to be there to import their base classes without a GPU; torch and ray are in .venv.
"$python" -m pip install --quiet --no-deps --target .frameworks/needs \
  aiofiles antlr4-python3-runtime==4.9.3 blinker cachetools cloudpickle codetiming colorlog einops flask hydra-core \
  importlib_metadata itsdangerous jiter lark llvmlite loguru msgspec numba omegaconf openai orjson peft pillow pylatexenc \
  pyvers pyzmq skyrl_gym sortedcontainers tenacity tensordict torchdata TransferQueue uvloop werkzeug zipp
[ "${1:-}" = checkouts ] || exit 0
for repository in THUDM/slime radixark/miles PrimeIntellect-ai/prime-rl; do
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
