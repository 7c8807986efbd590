#!/usr/bin/env bash
# Makes an environment in which vLLM 0.33.0's scheduler core (Scheduler, KVCacheManager, BlockPool)
# imports on a machine without a GPU, to run tests/peers and the benchmarks *_vllm* in. A few minutes
# and about 3 GB; pip warns about pins that the core does not need. Never a dependency of pagedtq.
#
#   tests/peers/vllm_environment.sh DIR
#   DIR/bin/python -m pytest tests/peers
#   DIR/bin/python -m benchmarks.vllm_scheduler
set -euo pipefail
dir=${1:?usage: vllm_environment.sh DIR}
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet "torch==2.13.0" "numpy>=2" msgspec pytest hypothesis
"$dir/bin/pip" install --quiet --no-deps "vllm==0.33.0"
# What the imports of its core need; the rest of its requirements want a GPU or a server.
"$dir/bin/pip" install --quiet packaging psutil pyzmq urllib3 regex pydantic cbor2 transformers \
  aiohttp requests openai-harmony openai pillow pybase64 cachetools cloudpickle uvloop py-cpuinfo \
  prometheus_client xgrammar fastapi partial-json-parser llguidance
"$dir/bin/python" -c "import vllm.v1.core.sched.scheduler, vllm; print('vllm', vllm.__version__)"
