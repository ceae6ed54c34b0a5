#!/usr/bin/env bash
# All figures and weights that need a GPU, in pieces of under ten minutes:
#   benchmarks/gpu.sh [PIECE ...] [--data_dir HMIFDatasets] [--help]
# Results go to $OUT, by default result/gpu; what is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u benchmarks/gpu.py --out "${OUT:-result/gpu}" "$@"
