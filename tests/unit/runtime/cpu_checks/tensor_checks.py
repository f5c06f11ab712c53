"""What stands in for tensors on a GPU: literals, methods, type strings, compilation; and the state of the process."""

from __future__ import annotations

import os
import sys
import types
import warnings

import torch
from registry import CPU, check, is_on_the_cpu
from torch.overrides import _get_current_function_mode_stack

# Literals


@check
def cuda_literals_in_factory_functions():
    like = torch.zeros(2, 3)
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        for factory in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn):
            assert is_on_the_cpu(factory(2, 3, device=device), 2, 3), factory
        for factory in (torch.empty_like, torch.zeros_like, torch.ones_like, torch.rand_like):
            assert is_on_the_cpu(factory(like, device=device), 2, 3), factory
        assert is_on_the_cpu(torch.full((2, 3), 1.0, device=device), 2, 3)
        assert is_on_the_cpu(torch.arange(4, device=device), 4)
        assert is_on_the_cpu(torch.randint(5, (4,), device=device), 4)
        assert torch.tensor([1.5, 2.5], device=device).tolist() == [1.5, 2.5]
        assert torch.as_tensor([1, 2], device=device).tolist() == [1, 2]
        assert is_on_the_cpu(like.new_empty(4, device=device), 4)
        assert is_on_the_cpu(like.new_zeros((4,), device=device), 4)


@check
def cuda_literals_in_to():
    tensor = torch.arange(3.0)
    for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
        assert is_on_the_cpu(tensor.to(device), 3)
        assert is_on_the_cpu(tensor.to(device=device), 3)
        moved = tensor.to(device, torch.bfloat16, non_blocking=True)
        assert is_on_the_cpu(moved, 3) and moved.dtype == torch.bfloat16
    module = torch.nn.Linear(2, 2).to("cuda").to(device=torch.device("cuda", 0))
    assert module.weight.device == CPU and isinstance(module.weight, torch.nn.Parameter)
    assert torch.nn.Linear(2, 2, device="cuda").weight.device == CPU


@check
def device_objects_of_a_gpu_are_the_cpu():
    for device in (torch.device("cuda"), torch.device("cuda", 0), torch.device("cuda:1"), torch.device(type="cuda")):
        assert device == CPU
    # As megatron.training.training writes it.
    assert torch.device(f"cuda:{torch.cuda.current_device()}") == CPU
    assert torch.device("meta").type == "meta" and torch.device("cpu", 0).index == 0
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


@check
def other_devices_and_strings_are_left_alone():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.einsum("ij,j->i", torch.eye(2), torch.ones(2)).tolist() == [1, 1]


@check
def literals_reach_autograd_and_recomputation():
    """Backward runs Python functions; their factories must be mapped, too."""
    from torch.utils.checkpoint import checkpoint

    def loss(weight: torch.Tensor, reentrant: bool) -> torch.Tensor:
        return checkpoint(lambda w: (w * torch.arange(3.0, device="cuda")).sum(), weight, use_reentrant=reentrant)

    for reentrant in (True, False):
        weight = torch.ones(3, requires_grad=True)
        loss(weight, reentrant).backward()
        torch.autograd.backward(loss(weight, reentrant))
        assert weight.grad.tolist() == [0, 2, 4]
        assert len(_get_current_function_mode_stack()) == 1
    (gradient,) = torch.autograd.grad(loss(weight, False), weight)
    assert gradient.tolist() == [0, 1, 2]


@check
def pinned_memory_is_plain_memory():
    for tensor in (torch.empty(2, pin_memory=True), torch.zeros(2, pin_memory=True, device="cpu"), torch.ones(2)):
        assert is_on_the_cpu(tensor.pin_memory(), 2)
        assert tensor.pin_memory() is tensor
        assert not tensor.is_pinned()
    assert is_on_the_cpu(torch.empty_like(torch.ones(2), pin_memory=True), 2)


@check
def data_loader_with_pinned_memory():
    dataset = torch.utils.data.TensorDataset(torch.arange(6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _ignore_what_the_runtime_ignores()
        batches = [batch.tolist() for (batch,) in torch.utils.data.DataLoader(dataset, 4, pin_memory=True)]
    assert batches == [[0, 1, 2, 3], [4, 5]]
    assert not caught, [str(warning.message) for warning in caught]


def _ignore_what_the_runtime_ignores() -> None:
    from megatron_rpsd.runtime.cpu import ignore_expected_warnings

    ignore_expected_warnings()


@check
def cuda_methods_return_the_same_object():
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and tensor.cuda(0, non_blocking=True) is tensor
    assert module.cuda() is module and module.cuda(torch.cuda.current_device()) is module


@check
def type_strings_are_a_gpus():
    names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.int64: "torch.cuda.LongTensor",
    }
    for dtype, name in names.items():
        assert torch.zeros(2, dtype=dtype).type() == name
        assert torch.nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False).type() == name


@check
def type_still_converts():
    tensor = torch.ones(2)
    assert tensor.type(torch.float16).dtype == torch.float16
    assert tensor.type("torch.DoubleTensor").dtype == torch.float64
    assert tensor.type(dtype=torch.int64).dtype == torch.int64


@check
def type_takes_the_strings_that_it_gives():
    tensor = torch.ones(2)
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert tensor.type(half.type()).dtype == torch.bfloat16
    assert tensor.type("torch.cuda.LongTensor").dtype == torch.int64


@check
def accelerator_is_absent():
    assert torch.accelerator.is_available() is False
    assert torch.accelerator.current_accelerator() is None
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert torch.accelerator.device_count() == 0
    assert torch.accelerator.current_device_index() == 0
    torch.accelerator.synchronize()


# Compilation


@check
def megatrons_fused_functions_run_without_dynamo():
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from torch._dynamo.utils import counters

    gate, value = torch.randn(3, 4), torch.randn(3, 4)
    output = swiglu(torch.cat([gate, value], dim=-1))
    torch.testing.assert_close(output, gate * torch.sigmoid(gate) * value)
    assert not counters["frames"], dict(counters["frames"])


@check
def compile_is_the_identity():
    def function(x):
        return x + 1

    module = torch.nn.Linear(2, 2)
    assert torch.compile(function) is function
    assert torch.compile(dynamic=True)(function) is function
    assert torch.equal(torch.compile(module)(torch.ones(2)), module(torch.ones(2)))


# The process


@check
def a_second_install_changes_nothing():
    from megatron_rpsd.runtime.cpu import cpu_runtime_installed, install_cpu_runtime

    assert cpu_runtime_installed()
    owners = (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.accelerator, torch.Tensor, torch.nn.Module)
    before = [dict(vars(owner)) for owner in owners]
    modes = list(_get_current_function_mode_stack())
    assert [type(mode).__name__ for mode in modes] == ["_CudaLiteralsToCpu"]
    install_cpu_runtime()
    install_cpu_runtime(force=True)
    assert list(_get_current_function_mode_stack()) == modes
    assert [dict(vars(owner)) for owner in owners] == before


@check
def megatrons_environment_is_set():
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


def parsed_by_megatron(*flags: str):
    from megatron.training.arguments import parse_args

    sys.argv = [sys.argv[0], *flags]
    return parse_args()


@check
def cpu_arguments_equal_the_documented_flags():
    """Megatron's own parser is the oracle: the flags that a user would have to type."""
    from megatron_rpsd.runtime.cpu import set_cpu_arguments

    typed = parsed_by_megatron(
        *"--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion".split(),
        *"--no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion".split(),
        *"--no-bias-dropout-fusion --distributed-backend gloo".split(),
    )
    default, ours = parsed_by_megatron(), parsed_by_megatron()
    set_cpu_arguments(ours)
    assert vars(ours) == vars(typed)
    assert vars(ours) != vars(default)


@check
def an_argument_that_megatron_renamed_is_noticed():
    from megatron_rpsd.runtime.cpu import set_cpu_arguments

    try:
        set_cpu_arguments(types.SimpleNamespace(transformer_impl="local"))
    except AssertionError as error:
        assert "Megatron has no argument" in str(error)
    else:
        raise AssertionError("an argument was set that Megatron does not have")
