"""Imported once by the server that ranks are forked from."""

import logging
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from megatron_rpsd.runtime.cpu import install_cpu_runtime  # noqa: E402

# Every rank of the suite runs on the CPU, on a machine with a GPU too.
install_cpu_runtime(force=True)

import megatron.core.distributed  # noqa: E402,F401

import megatron_rpsd.checkpoint.convert  # noqa: E402,F401
import megatron_rpsd.evaluation.probe  # noqa: E402,F401
import megatron_rpsd.training.run  # noqa: E402,F401
