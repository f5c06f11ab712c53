"""Around a training step: the check for infinities before the optimizer, and the alarm for a step that hangs."""

from __future__ import annotations

import faulthandler
import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.training import training
from megatron.training.utils.common_utils import print_rank_0
from torch import Tensor

POLICIES = ("stop", "skip")


class NonFinite(RuntimeError):
    """A step's loss or gradient is not finite; raised on every rank of the job, at the same step."""


class SampleIndices:
    """A data iterator around another one, which remembers the indices of the samples that it gave."""

    def __init__(self, data_iterator) -> None:
        self._data_iterator, self.seen = data_iterator, []

    def __iter__(self) -> SampleIndices:
        return self

    def __next__(self) -> Mapping[str, Tensor]:
        sample = next(self._data_iterator)  # Megatron's own iterators have no __iter__
        self.seen.extend(int(index) for index in sample["sample_index"])
        return sample


class SampleWatch:
    """Megatron's `forward_step_func` around another one, which remembers the samples of a step and their losses."""

    def __init__(self, forward_step: Callable) -> None:
        self.forward_step = forward_step
        self._seen: list[tuple[list[int], Tensor]] = []

    def __call__(self, data_iterator, model):
        samples = SampleIndices(data_iterator)
        output, loss_function = self.forward_step(samples, model)

        def loss_of(*given):
            answer = loss_function(*given)
            self._seen.append((samples.seen, answer[0].detach()))
            return answer

        return output, loss_of

    def forget(self) -> None:
        """Begin a step."""
        self._seen.clear()

    def suspects(self) -> list[int]:
        """Samples of the micro-batches whose loss is not finite, on this rank."""
        return [index for indices, loss in self._seen if not bool(torch.isfinite(loss).all()) for index in indices]


def gradients_finite(model: Sequence[torch.nn.Module]) -> Tensor:
    """Whether all of this rank's reduced gradients are finite: bool [], on the device, without a wait for it."""
    buffers = [buffer for stage in model for buffer in (*stage.buffers, *stage.expert_parallel_buffers)]
    # The largest magnitude carries NaN and infinity, and overflows where no value does.
    largest = [torch.linalg.vector_norm(buffer.grad_data, ord=float("inf")) for buffer in buffers]
    return torch.isfinite(torch.stack(largest)).all()


class StepGuard:
    """Decides, before the optimizer and on all ranks alike, whether a step's update is taken.

    Args:
        watch: the forward step that knows the samples.
        policy: stop: end the run; skip: leave the parameters as they are and go on.
        most: skipped steps in a row at which the run ends all the same.
        tell: called on every rank with "skipped" and a line for each step that is skipped.
    """

    def __init__(
        self,
        watch: SampleWatch,
        policy: str,
        most: int,
        tell: Callable[[str, str], None] = lambda kind, text: None,
    ) -> None:
        assert policy in POLICIES and most >= 1
        self.watch, self.policy, self.most, self.tell = watch, policy, most, tell
        self.skipped = 0

    def allows(self, iteration: int, model: Sequence[torch.nn.Module]) -> bool:
        """True where loss and gradients are finite everywhere; False where the step is to be skipped.

        Raises:
            NonFinite: the step is not finite and the run ends.
        """
        suspects = self.watch.suspects()
        bad = torch.stack([~gradients_finite(model), torch.tensor(bool(suspects), device=torch.cuda.current_device())])
        bad = bad.any().to(torch.int32)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not bad:
            self.skipped = 0
            return True
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, suspects)
        samples = sorted({index for part in parts for index in part})
        what = f"loss of samples {', '.join(map(str, samples))}" if samples else "gradient, at a finite loss,"
        text = f"step {iteration}: the {what} is not finite"
        self.skipped += 1
        if self.policy == "stop" or self.skipped > self.most:
            again = f", after {self.most} skipped steps in a row" if self.policy == "skip" else ""
            raise NonFinite(f"{text}{again}; the parameters are those of step {iteration - self.skipped}")
        print_rank_0(f"warning: {text}; its update is skipped")
        self.tell("skipped", f"{text}; its update is skipped")
        return False


def guard_steps(guard: StepGuard | None, timeout_seconds: float | None) -> None:
    """Surround Megatron's `train_step`. Once a process.

    Args:
        guard: None: no look at gradients.
        timeout_seconds: a step, with all that follows it until the next one (evaluation, checkpoint), may take so long;
            then every thread's stack is written to stderr and the process ends, on every rank that waits. None: ever.
    """
    original = training.train_step

    @functools.wraps(original)
    def train_step(forward_step_func, data_iterator, model, optimizer, *args, iteration=None, **kwargs):
        if timeout_seconds is not None:
            faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=sys.__stderr__)
        if guard is not None:
            guard.watch.forget()
            _guard_optimizer(optimizer, lambda: guard.allows(iteration + 1, model))
        return original(forward_step_func, data_iterator, model, optimizer, *args, iteration=iteration, **kwargs)

    training.train_step = train_step


def _guard_optimizer(optimizer, allowed: Callable[[], bool]) -> None:
    """Replace this optimizer's `step` by one that asks first."""
    step = type(optimizer).step
    optimizer.step = lambda: step(optimizer) if allowed() else (False, None, None)
