"""Install the CPU runtime, run every check, print {name: null, or the failure's traceback} as the last line.

One process for all: installing changes a process for good, and importing Megatron takes seconds.
"""

from __future__ import annotations

import json
import traceback

import device_checks  # noqa: F401  registers its checks
import tensor_checks  # noqa: F401  registers its checks
from registry import CHECKS

from megatron_rpsd.runtime.cpu import install_cpu_runtime


def main() -> None:
    install_cpu_runtime(force=True)
    results = {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
