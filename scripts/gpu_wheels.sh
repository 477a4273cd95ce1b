#!/usr/bin/env bash
# Collect the wheels that a GPU machine without a network lacks, for gpu_check.sh: bash scripts/gpu_wheels.sh DIR
# It has Python 3.12, torch 2.11 with CUDA 13, transformers, triton, peft, accelerate, pyarrow, pandas, pytest, hypothesis.
# Unsloth and flash-attn stay away: with them it would be more than the 60 MB that may travel.
set -euo pipefail
folder=${1:?usage: bash scripts/gpu_wheels.sh DIR}
limit_mb=60

needed=(pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection tyro==1.0.17 docstring-parser typeguard)
peers=(datasets==5.2.0 dill multiprocess trl==1.16.0 liger-kernel cut-cross-entropy bitsandbytes==0.50.2)

platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

mkdir -p "$folder"
rm -f "$folder"/*.whl
for package in "${needed[@]}" "${peers[@]}"; do
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d "$folder" "$package" || echo "gpu_wheels: no wheel of $package" >&2
done
size_mb=$(($(du -sk "$folder" | cut -f1) / 1024))
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $size_mb MB in $folder"
if [ "$size_mb" -gt "$limit_mb" ]; then
    echo "gpu_wheels: more than the $limit_mb MB that may travel" >&2
    exit 1
fi
