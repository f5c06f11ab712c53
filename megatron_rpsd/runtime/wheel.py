"""Repairs of the released Megatron wheel, each with the upstream change that ends it. Idempotent."""

from __future__ import annotations

import functools
import queue

import torch
from megatron.core.datasets import helpers_cpp  # noqa: F401  fails here, clearly, where the wheel lacks its binary
from megatron.core.datasets import utils as dataset_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import distrib_optimizer
from megatron.training import global_vars

_REPAIRED = "_repaired_by_megatron_rpsd"


def repair_wheel() -> None:
    """Apply every repair."""
    _use_prebuilt_dataset_helpers()
    _give_torch_adam_a_state_before_loading()
    _give_every_parameter_a_step_count_of_its_own()
    _load_fp32_shards_without_autograd()
    _save_without_a_process_for_the_results()


def _use_prebuilt_dataset_helpers() -> None:
    """Keep `initialize_megatron` from running `make` for a library that the wheel already carries.

    The wheel of megatron-core 0.19 ships `helpers_cpp` built, but `compile_helpers` calls `make` in the package folder,
    where the wheel has no Makefile, and exits. Ends when upstream skips the compilation of a prebuilt helper.
    """
    dataset_utils.compile_helpers = lambda: None


def _give_torch_adam_a_state_before_loading() -> None:
    """Let the distributed optimizer resume with torch's Adam, that is without Apex and Transformer Engine.

    `DistributedOptimizer.sharded_state_dict(is_loading=True)` first reads the step count from the optimizer's state,
    which a new torch Adam does not have yet (an assertion on an empty list), and only then makes a state to load into.
    Here the state is made first. Ends when upstream initialises before it reads.
    """
    original = distrib_optimizer.DistributedOptimizer.sharded_state_dict
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(original, _REPAIRED):
        return

    @functools.wraps(original)
    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    setattr(sharded_state_dict, _REPAIRED, True)
    distrib_optimizer.DistributedOptimizer.sharded_state_dict = sharded_state_dict


def _give_every_parameter_a_step_count_of_its_own() -> None:
    """Keep a resumed torch Adam from counting a step once a parameter.

    Without Apex and Transformer Engine `DistributedOptimizer.load_state_dict` puts *one* step tensor into the state of
    all parameters, and torch's Adam increments it in place for each. In the dp_reshardable format it then also copies
    over it the count from before loading, which that format keeps as a local object: 0. Either way the bias correction
    of every step after a resume is wrong, silently. Ends when upstream clones the count, as it does for its hybrid
    optimizer, and leaves it out of the shards' tensors.
    """
    cls = distrib_optimizer.DistributedOptimizer
    original = cls.load_state_dict
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(original, _REPAIRED):
        return

    @functools.wraps(original)
    def load_state_dict(self, state_dict):
        original(self, state_dict)
        (step,) = {group["step"] for group in state_dict["optimizer"]["param_groups"]}
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(step))

    setattr(load_state_dict, _REPAIRED, True)
    cls.load_state_dict = load_state_dict


def _load_fp32_shards_without_autograd() -> None:
    """Let the distributed optimizer resume a run whose parameters are fp32.

    Its main parameters are then views of the model's own, which require gradients, and
    `_set_main_param_and_optimizer_states` copies into them with autograd on. It also looks for every tensor of torch's
    Adam among the loaded ones, where the fully_reshardable format holds no step count; that is set elsewhere. Ends when
    upstream copies under no_grad and leaves the count out.
    """
    cls = distrib_optimizer.DistributedOptimizer
    original = cls._set_main_param_and_optimizer_states
    if hasattr(original, _REPAIRED):
        return

    @functools.wraps(original)
    @torch.no_grad()
    def repaired(self, model_param, tensors):
        original(self, model_param, {"step": None, **tensors})

    setattr(repaired, _REPAIRED, True)
    cls._set_main_param_and_optimizer_states = repaired


def _save_without_a_process_for_the_results() -> None:
    """Keep a rank's first checkpoint from starting a Python of its own.

    What was written comes back through a queue that a spawned server process holds; that process imports the run's main
    module first, torch and Megatron with it: seconds a rank, and memory. A save that is not asynchronous writes in
    the rank's own threads, for which a plain queue does. Ends when upstream starts the server for asynchronous saves
    alone.
    """
    original = filesystem_async.get_write_results_queue
    if hasattr(original, _REPAIRED):
        return

    @functools.wraps(original)
    def get_write_results_queue(*args, **kwargs):
        settled = global_vars._GLOBAL_ARGS
        if settled is not None and settled.async_save:
            return original(*args, **kwargs)
        return queue.SimpleQueue()

    setattr(get_write_results_queue, _REPAIRED, True)
    filesystem_async.get_write_results_queue = get_write_results_queue
