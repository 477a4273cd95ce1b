#!/usr/bin/env bash
# All that is to be known from a GPU machine at hand for minutes, most telling first, within SECONDS:
#   bash scripts/gpu_check.sh DIR OUT SECONDS
# DIR holds the wheels of gpu_wheels.sh (none are needed where everything is installed), OUT takes results as they come.
# Started again, it runs what is missing in OUT. Without a GPU it tries itself out on tiny shapes.
set -euo pipefail
if [ $# -ne 3 ]; then
    echo "usage: bash scripts/gpu_check.sh DIR OUT SECONDS" >&2
    exit 2
fi
wheels=$1 out=$2 seconds=$3 python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out"

site=${TMPDIR:-/tmp}/capotune-gpu-site
if compgen -G "$wheels/*.whl" >/dev/null && [ ! -d "$site" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site.new" "$wheels"/*.whl
    mv "$site.new" "$site"
fi
[ ! -d "$site" ] || export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1
exec "$python" "$here/scripts/gpu_check.py" "$out" "$seconds"
