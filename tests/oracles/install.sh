#!/usr/bin/env bash
# Makes the environments that the tests of exports ask: tests/oracles/install.sh [torchtitan megatron deepspeed]
# About two minutes and 3.5 GB, of which torch is most. They lie in .oracles, or where PARSIM_ORACLES says.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${PARSIM_ORACLES:-.oracles}
export PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$folder"
for name in "${@:-torchtitan megatron deepspeed}"; do for framework in $name; do
  target=$folder/$framework
  [[ -e $target/complete ]] && continue
  rm -rf "$target"
  python3 -m venv "$target"
  pip=("$target/bin/pip" install --quiet "torch==2.13.*" numpy)
  case $framework in
    torchtitan) "${pip[@]}" "torchtitan==0.3.0" torchao ;;
    deepspeed) "${pip[@]}" "deepspeed==0.19.8" ;;
    megatron)
      "${pip[@]}" packaging einops typing_extensions
      # Its wheel is for Python 3.12; what the tests use runs on 3.11 too.
      wheel=$(mktemp -d)
      "$target/bin/pip" download --quiet --no-deps --python-version 3.12 --only-binary=:all: \
        --dest "$wheel" "megatron-core==0.19.2"
      "$target/bin/python" -m zipfile -e "$wheel"/*.whl \
        "$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
      rm -rf "$wheel" ;;
    *) echo "unknown framework: $framework" >&2; exit 2 ;;
  esac
  touch "$target/complete"
done; done
