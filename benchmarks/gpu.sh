#!/usr/bin/env bash
# All figures and weights that need a GPU, in pieces of under ten minutes:
#   benchmarks/gpu.sh [PIECE ...] [--data_dir HMIFDatasets] [--help]
# Results go to $OUT, by default result/gpu; what is done is not done again.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
exec "${PYTHON:-python3}" -u "$here/gpu.py" ${OUT:+--out "$OUT"} "$@"
