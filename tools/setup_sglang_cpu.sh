#!/usr/bin/env bash
# Installs SGLang for machines without CUDA into an environment of its own:
#
#   bash tools/setup_sglang_cpu.sh [folder, default .venv-sglang]
#
# About two minutes, half a gigabyte to fetch, 3 GB on disk. tools/bench_engine.py compares with it.
# SGLang's own requirements are torch with CUDA and compiled kernels for it, so nothing is installed
# with its dependencies: the list below is what it imports on a CPU. What else it takes: a platform
# (npr_megatron/engine/sglang/cpu_platform.py, found by its entry point) and tools/sglang_torchvision.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
venv="$(realpath -m "${1:-$root/.venv-sglang}")"

alone=(sglang==0.5.23 torchvision==0.28.0 triton xgrammar==0.2.7 compressed-tensors==0.18.0)
needs=(
  transformers==5.19.0 tokenizers==0.23.2 openai==2.8.0 openai-harmony==0.0.4
  apache-tvm-ffi==0.1.11 numpy scipy einops pillow gguf sentencepiece dill easydict xxhash
  fastapi uvicorn uvloop aiohttp requests python-multipart pyzmq orjson msgspec pydantic pybase64
  partial_json_parser prometheus-client psutil setproctitle loguru IPython
)

mkdir -p "$venv"
[[ -x "$venv/bin/python" ]] || make_venv
install_cpu_torch
echo "  ${alone[0]} and what it imports"
pip_install --no-deps "${alone[@]}"
pip_install "${needs[@]}" --constraint "$constraints"
pip_install --no-deps --editable "$root"
is_cpu_torch "$(grep '^torch==' "$constraints")" || {
  echo "torch was replaced by another build; remove $venv and run this again" >&2
  exit 2
}
packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp "$root/tools/sglang_torchvision.py" "$packages/"
echo "import sglang_torchvision" >"$packages/sglang_torchvision.pth"
"$venv/bin/python" -c 'import sglang' # fails here rather than in the first use
echo "SGLang is in $venv"
