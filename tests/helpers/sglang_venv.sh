#!/usr/bin/env bash
# A venv with the real SGLang, which serves a small text model on a CPU by torch's own operators:
#
#     bash tests/helpers/sglang_venv.sh DIRECTORY
#     OPSD_SGLANG_PYTHON=DIRECTORY/bin/python pytest -m sglang
#
# Some 3 GB and five minutes. SGLang's wheel asks for CUDA's libraries and kernels, of which such a
# server uses nothing: it is installed without them, and what it needs is listed here. Where pip's
# index has no CPU build of torch, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
directory=${1:?"usage: bash tests/helpers/sglang_venv.sh DIRECTORY"}

python3 -m venv "$directory"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$directory/bin/pip" install --quiet --prefer-binary)
"${pip[@]}" torch==2.13.0
"${pip[@]}" torch==2.13.0 transformers==5.19.0 accelerate datasets fastapi uvicorn uvloop aiohttp \
  orjson msgspec pillow psutil pydantic pyzmq requests setproctitle pybase64 IPython einops \
  sentencepiece tiktoken openai==2.8.0 partial_json_parser python-multipart prometheus-client scipy \
  soundfile interegular compressed-tensors==0.18.0 gguf xxhash zstandard numba tqdm regex jsonschema \
  triton
"${pip[@]}" --no-deps sglang==0.5.23 apache-tvm-ffi==0.1.11 xgrammar==0.2.7 torchvision==0.28.0
site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
# PyPI's torchvision is for CUDA: its operators do not load here, and this module wants them.
: > "$site/torchvision/_meta_registrations.py"
# SGLang imports names of its kernels for CPUs, which are on no index. None is called.
mkdir -p "$site/sgl_kernel"
cat > "$site/sgl_kernel/__init__.py" <<'END'
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name}")

    return missing
END
SGLANG_USE_CPU_ENGINE=1 "$directory/bin/python" -W ignore -c 'import sglang.launch_server as s; print(s.__name__)'
