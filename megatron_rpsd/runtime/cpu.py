"""The CPU runtime: one process-wide stand-in for `torch.cuda`, so that Megatron's own training loop runs on gloo.

Megatron 0.19 names the accelerator literally (`device='cuda'`, `torch.cuda.current_device()`, type strings such as
`torch.cuda.FloatTensor`). Nothing in the loop, in DDP, in the distributed optimizer, in the pipeline schedules or in
the torch_dist checkpoints needs a GPU otherwise. `install_cpu_runtime` answers those names with the CPU:

| name | stand-in |
|---|---|
| `torch.cuda` device, stream, event, RNG, property functions, nvtx | the CPU, nothing to wait for |
| `torch.cuda` memory figures | this process's resident set |
| literals `device='cuda'`, `pin_memory=True` in factory functions and `.to` | mapped by a TorchFunctionMode |
| `Tensor.cuda`, `Module.cuda`, `Tensor.pin_memory` | the same tensor |
| `Tensor.type()` | type strings as a GPU would print them |
| `torch.accelerator` | absent, so that DataLoader pins nothing and torch.distributed picks the CPU |
| Megatron's `_get_cuda_rng_state`, `_set_cuda_rng_state` | the CPU generator |
| dynamo (Megatron's `jit_fuser`) | switched off |

What it does not reach: literals in threads other than the one that installs it, custom CUDA kernels (Transformer
Engine, Apex), CUDA graphs, fp8, Megatron-FSDP. It ends when Megatron takes the device from configuration.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import types
import warnings

import torch
import torch._dynamo  # before patching: its import inspects torch.cuda
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def cpu_runtime_installed() -> bool:
    """True once `install_cpu_runtime` has run in this process."""
    return _installed


def install_cpu_runtime(force: bool = False) -> None:
    """Answer Megatron's CUDA names with the CPU, for the rest of this process. A second call does nothing.

    Args:
        force: install although a GPU is present. The GPU then cannot be used by this process.

    Raises:
        ValueError: a GPU is present and `force` is not set.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available() and not force:
        raise ValueError(
            f"--device cpu: this machine has a GPU ({torch.cuda.get_device_name(0)}), which the CPU runtime would hide "
            "from this process; use --device cuda, or add --force-cpu-runtime"
        )
    # Megatron asserts this variable for tensor and context parallelism before Blackwell; it has no effect on a CPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Read by torch.compile, which is then the identity. Dynamo's configuration alone would still wrap every function.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    ignore_expected_warnings()
    _stand_in_for_devices()
    _stand_in_for_streams()
    _stand_in_for_memory()
    _stand_in_for_random_state()
    _stand_in_for_tensor_methods()
    _stand_in_for_accelerator()
    _map_literals()
    _installed = True
    _stand_in_for_megatron_random_state()


def ignore_expected_warnings() -> None:
    """Leave out the warnings that say no more than that there is no GPU.

    Megatron warns once a module that Apex and Transformer Engine are absent, DataLoader that it pins nothing.
    Megatron's sources are compiled at their first import, and one holds an escape sequence that Python warns of.
    """
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for expected in (
        "Apex",
        "Transformer Engine",
        "transformer-engine",
        "Could not determine rank",
        "'pin_memory' arg",
    ):
        warnings.filterwarnings("ignore", message=f".*{expected}.*")


def _stand_in_for_devices() -> None:
    properties = types.SimpleNamespace(
        name="cpu", major=9, minor=0, total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        multi_processor_count=os.cpu_count(), gcnArchName="cpu",
    )  # fmt: skip
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.init = cuda._lazy_init = lambda: None
    # Megatron asks for the device count only to decide whether to build its process groups.
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.get_device_name = lambda device=None: "cpu"
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0
    cuda.nvtx.mark = lambda message: None
    cuda.utilization = cuda.temperature = cuda.power_draw = cuda.clock_rate = lambda device=None: 0


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args, **kwargs):
        self.device = _CPU

    def _nothing(self, *args, **kwargs):
        return None

    synchronize = wait_stream = wait_event = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        event = _Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


class _Event:
    """An event that has happened; `elapsed_time` is measured on the host's clock."""

    def __init__(self, *args, **kwargs):
        self._seconds = 0.0

    def record(self, stream=None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream=None) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end._seconds - self._seconds) * 1e3


def _stand_in_for_streams() -> None:
    cuda = torch.cuda
    only_stream = _Stream()
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: only_stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = lambda stream: None
    cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.record_stream = lambda self, stream: None


def _status_bytes(field: str) -> int:
    """VmRSS, or its peak VmHWM, of /proc/self/status. (The peak of getrusage is inherited from the parent process.)"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def _reset_peak(device=None) -> None:
    with open("/proc/self/clear_refs", "w") as references:
        references.write("5")  # proc(5): sets the peak to the current resident set


def _stand_in_for_memory() -> None:
    """Memory figures are this process's resident set, in bytes: what a user of a CPU run wants to read in the log."""
    cuda = torch.cuda

    def current(device=None):
        return _status_bytes("VmRSS")

    def peak(device=None):
        return _status_bytes("VmHWM")

    def stats(device=None):
        return {
            "allocated_bytes.all.current": current(), "allocated_bytes.all.peak": peak(),
            "reserved_bytes.all.current": current(), "reserved_bytes.all.peak": peak(),
            "allocation.all.current": 0, "num_alloc_retries": 0, "num_ooms": 0,
        }  # fmt: skip

    def free_and_total(device=None):
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    for module in (cuda, cuda.memory):
        module.memory_allocated = module.memory_reserved = module.device_memory_used = current
        module.max_memory_allocated = module.max_memory_reserved = peak
        module.memory_stats = stats
        module.mem_get_info = free_and_total
        module.empty_cache = lambda: None
        module.reset_peak_memory_stats = module.reset_max_memory_allocated = _reset_peak


def _stand_in_for_random_state() -> None:
    cuda = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
        module.manual_seed = module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed))
        module.seed = module.seed_all = torch.default_generator.seed
        module.initial_seed = torch.default_generator.initial_seed
    cuda.default_generators = (torch.default_generator,)


def _stand_in_for_megatron_random_state() -> None:
    """Megatron's wrappers reach CUDA generators by index; it imports them by name only inside this module."""
    from megatron.core.tensor_parallel import random as megatron_random

    # A fork of the tracker sees "the CPU generator" move, which is the one it forked, and says so every time.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _stand_in_for_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def type_as_on_a_gpu(self, dtype=None, *args, **kwargs):
        # Megatron's optimizers and clip_grads compare this string with 'torch.cuda.FloatTensor' and its siblings.
        if dtype is None:
            name = original_type(self)  # under a function mode torch looks the method up again, and finds this one
            return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)  # what it gives out, it takes back
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_as_on_a_gpu
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _stand_in_for_accelerator() -> None:
    # False here keeps DataLoader from pinning and torch.distributed from choosing a CUDA device for gloo's objects.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda check_available=False: None
    torch.accelerator.device_count = lambda: 0
    torch.accelerator.synchronize = lambda device=None: None
    torch.accelerator.current_device_index = lambda: 0


def _names_cuda(value) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


class _CudaLiteralsToCpu(TorchFunctionMode):
    """Maps `device='cuda'` to the CPU in every torch function, and drops `pin_memory=True`, which needs a GPU.

    A mode belongs to the thread that enters it.
    """

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            # A name may carry an index, or Megatron's f"cuda:{torch.cuda.current_device()}", which reads cuda:cpu here.
            return _CPU if any(map(_names_cuda, (*args, *kwargs.values()))) else func(*args, **kwargs)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if len(args) > 1 and any(_names_cuda(value) for value in args):
            args = tuple(_CPU if _names_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _map_literals() -> None:
    mode = _CudaLiteralsToCpu()
    mode.__enter__()
    run_backward = torch.autograd._engine_run_backward

    def run_backward_under_the_mode(*args, **kwargs):
        # Tensor.backward is a torch function: torch leaves the mode for its whole run, recomputed layers included.
        with mode:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_under_the_mode


# What Megatron's layer specification without Transformer Engine and Apex needs; users should not have to know it.
LOCAL_SPEC_ARGUMENTS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
}


def set_cpu_arguments(args) -> None:
    """Set in Megatron's parsed `args` what the CPU needs: gloo, and the local layer specification without fusions."""
    args.distributed_backend = "gloo"
    for name, value in LOCAL_SPEC_ARGUMENTS.items():
        assert hasattr(args, name), f"Megatron has no argument {name}"
        setattr(args, name, value)
