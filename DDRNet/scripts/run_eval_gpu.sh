#!/usr/bin/env bash
# Evaluate a checkpoint on one GPU device: bash run_eval_gpu.sh [DEVICE_ID] [CONFIG_PATH] [CHECKPOINT_PATH]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

evaluate GPU "$@"
