"""Imported once by the server that the lab's ranks are forked from: torch and Megatron take many seconds to import."""

import logging
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from megatron_rpsd.runtime.cpu import install_cpu_runtime  # noqa: E402

install_cpu_runtime(force=True)

import megatron.core.datasets.helpers  # noqa: E402,F401
import megatron.core.distributed  # noqa: E402,F401
import megatron.core.models.mimo  # noqa: E402,F401
import megatron.core.tokenizers.text.models  # noqa: E402,F401
import megatron.training.training  # noqa: E402,F401

import megatron_rpsd.training.main  # noqa: E402,F401
import megatron_rpsd.training.run  # noqa: E402,F401
