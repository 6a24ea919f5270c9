#!/bin/sh
# All that a GPU machine has to tell, in one command of under nine minutes: MFU by batch size against the measured matmul
# peak, a population's gain, fintx beside PyTorch, and a 200M study. Writes one JSON.
#
#   tools/bench/gpu.sh [FILE.json] [--dry] [--rivals PYTHON] [--seconds 530]
#
# --dry: tiny sizes, on whatever is there; to see that the script runs. PYTHON: that of the environment that holds torch.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$here/gpu.py" "$@"
