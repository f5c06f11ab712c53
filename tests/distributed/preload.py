"""Imported once by the server that ranks are forked from."""

import argparse
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
import megatron.core.models.mimo  # noqa: E402,F401
import megatron.core.tokenizers.text.models  # noqa: E402,F401
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

import megatron_rpsd.checkpoint.convert  # noqa: E402,F401
import megatron_rpsd.evaluation.probe  # noqa: E402,F401
import megatron_rpsd.training.run  # noqa: E402,F401

_read = ArgumentGroupFactory._get_field_docstrings
_docstrings: dict[type, dict[str, str]] = {}


def _remembered(factory: ArgumentGroupFactory, described: type) -> dict[str, str]:
    """Megatron reads its flags' help out of its sources, twice a start; here once for all ranks."""
    if described not in _docstrings:
        _docstrings[described] = _read(factory, described)
    return dict(_docstrings[described])


ArgumentGroupFactory._get_field_docstrings = _remembered
add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
