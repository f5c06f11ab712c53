"""CLM and divergences from hidden states and the output layer's weight, without logits that outlive a chunk of tokens.

    total = sum_i clm_weights_i r_i CE(standard_i, label_i)        r_i = reweigh(CE_i, detached), 1 by default
          + sum_j view_weights_j D(perturbed_j || standard_(n-m+j), detached)
          + sum_i teacher_weights_i D(standard_i || teacher_i, detached)

For a chunk of tokens and each of its readings: logits = hidden W^T (real columns of this rank only), their maxima, sums
of exponentials and what the divergences need (`readings`, `divergences`, `top_k`), one all-gather of these few floats
per token over the tensor-parallel group, and from them dtotal/dlogits = G in the logits' own memory. The same pass
ends with d hidden = G W and dW += G^T hidden: the next chunk overwrites G. The standard view's logits are formed once
and serve both as CLM input and as teacher. Six matrix products of the chunk's rows with W are all that is left:
three of each reading, as in any forward and backward pass.

Backward multiplies by the incoming scalar. Who holds what: hidden states are whole along tensor parallelism within the
pass, W is this rank's rows; per-token values come out the same on every rank, bitwise; gradients of hidden states are
this rank's partial sums until `split_readings`, run backwards inside the pass, reduces them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpsd.loss.chunks import DEFAULT_CHUNK_BYTES, Chunk, Workspace, plan_chunks
from megatron_rpsd.loss.divergences import DensePair, Divergence
from megatron_rpsd.loss.known_top_k import KnownTopK, KnownTopKPair
from megatron_rpsd.loss.readings import Normaliser, Reading, gather_statistics
from megatron_rpsd.loss.top_k import TopKPair
from megatron_rpsd.parallel import VocabularyShard


@dataclass(frozen=True)
class Teacher:
    """Another model's reading of the standard view's tokens.

    Attributes:
        hidden: [n, h'], no gradient; the teacher's own hidden size and precision.
        weight: [v/tp, h'], its output layer's rows for the same columns as the student's (more padding is allowed).
        divergence: taken of the student from it.
        weights: per token [n].
        logit_scale: multiplies its logits.
    """

    hidden: Tensor
    weight: Tensor
    divergence: Divergence
    weights: Tensor
    logit_scale: float = 1.0


@dataclass(frozen=True)
class LinearLoss:
    """What the pass returns.

    Attributes:
        total: the weighed sum; the only differentiable one. fp32 (fp64 for fp64 hidden states), as are all others.
        clm: -log p(label) of every standard token [n].
        view: divergence of every perturbed token [m], T^2 included, unweighed.
        teacher: divergence of every standard token from the teacher [n], or empty.
    """

    total: Tensor
    clm: Tensor
    view: Tensor
    teacher: Tensor


def whole_readings(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Standard tokens only: the default `split_readings`."""
    return hidden, hidden[:0]


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    clm_weights: Tensor,
    shard: VocabularyShard,
    *,
    split_readings: Callable[[Tensor], tuple[Tensor, Tensor]] = whole_readings,
    view_weights: Tensor | None = None,
    divergence: Divergence = Divergence(),  # noqa: B008 - immutable
    teacher: Teacher | KnownTopK | None = None,
    reweigh: Callable[[Tensor, slice], Tensor] | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES["cpu"],
) -> LinearLoss:
    """The weighed sum of losses, and every token's own.

    Args:
        hidden: this rank's final hidden states, any shape.
        weight: [v/tp, h], the output layer's rows of this tensor-parallel rank (or the tied embedding's).
        labels: int64 [n].
        clm_weights: [n], 0 masks a token.
        shard: the columns that this rank holds; padded ones take no probability and get no gradient.
        split_readings: `hidden` -> standard [n, h] and perturbed [m, h], whole along tensor parallelism, by
            differentiable operations. Perturbed token j is the second reading of standard token n - m + j. What it
            gathers is reduced again within the forward pass: only the gradient of `hidden` itself waits for backward.
        view_weights: [m], importance and KL weights of the perturbed tokens.
        divergence: the perturbed view's from the standard view.
        teacher: an external teacher of the standard view, or what is known of it.
        reweigh: (CLM of standard tokens [c], which of the n they are) -> factors r [c] on their weights, a function of
            each token alone; no gradient flows through it (LongCE, arXiv 2410.23771).
        logit_scale: multiplies the logits.
        chunk_bytes: memory for a chunk's logits and what is formed from them, at least one token's.

    Raises:
        RuntimeError: on a second backward pass through the same loss; gradients are handed out, not kept.
    """
    assert weight.shape[0] == shard.vocab_stop - shard.vocab_start and chunk_bytes > 0
    arguments = _Pass(
        labels, clm_weights, shard, split_readings, view_weights, divergence, teacher, reweigh, logit_scale, chunk_bytes
    )
    if not torch.is_grad_enabled():  # autograd would still say that a parameter wants its gradient
        hidden, weight = hidden.detach(), weight.detach()
    return LinearLoss(*_FusedLinearLoss.apply(hidden, weight, arguments))


@dataclass(frozen=True)
class _Pass:
    """Everything of a call that takes no gradient."""

    labels: Tensor
    clm_weights: Tensor
    shard: VocabularyShard
    split_readings: Callable[[Tensor], tuple[Tensor, Tensor]]
    view_weights: Tensor | None
    divergence: Divergence
    teacher: Teacher | KnownTopK | None
    reweigh: Callable[[Tensor, slice], Tensor] | None
    logit_scale: float
    chunk_bytes: int


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, arguments: _Pass):
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            local = hidden.detach().requires_grad_(wanted)
            standard, perturbed = arguments.split_readings(local)
        loss = _ChunkedPass(standard.detach(), perturbed.detach(), weight.detach(), arguments, ctx.needs_input_grad[:2])
        loss.run()
        ctx.weight_gradient, ctx.weight, ctx.gradient = loss.weight_gradient, weight, None
        if wanted:
            (ctx.gradient,) = torch.autograd.grad(
                (standard, perturbed), local, (loss.standard_gradient, loss.perturbed_gradient)
            )
        ctx.spent = False
        ctx.mark_non_differentiable(loss.clm, loss.view, loss.teacher)
        return loss.total(), loss.clm, loss.view, loss.teacher

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_):
        if ctx.spent:
            raise RuntimeError("the fused loss hands its gradients out: a second backward pass needs a second forward")
        gradient, weight_gradient, weight = ctx.gradient, ctx.weight_gradient, ctx.weight
        ctx.spent, ctx.gradient, ctx.weight_gradient, ctx.weight = True, None, None, None
        if gradient is not None:
            gradient.mul_(grad)
        if weight_gradient is not None:
            weight_gradient = _hand_out(weight, weight_gradient.mul_(grad))
        return gradient, weight_gradient, None


def _hand_out(weight: Tensor, gradient: Tensor) -> Tensor:
    """The weight's gradient for autograd; under Megatron's DDP it goes to main_grad, unrounded, by Megatron's protocol.

    DDP adds what autograd returns unless `grad_added_to_main_grad` says that this has been done; `zero_out_wgrad` marks
    a tied weight, whose other gradient (the embedding's) is added to what is returned here, so that must be 0.
    """
    if not hasattr(weight, "grad_added_to_main_grad") or not hasattr(weight, "main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


class _ChunkedPass:
    """One pass over all chunks of tokens."""

    def __init__(self, standard: Tensor, perturbed: Tensor, weight: Tensor, arguments: _Pass, wanted: Sequence[bool]):
        """`wanted`: whether gradients of hidden states and of the weight are."""
        self.standard, self.perturbed, self.arguments = standard, perturbed, arguments
        self.weight = weight[: arguments.shard.columns]  # padding is never multiplied
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.clm = standard.new_empty(len(standard), dtype=kind)
        self.view = standard.new_empty(len(perturbed), dtype=kind)
        self.teacher = standard.new_empty(len(standard) if arguments.teacher else 0, dtype=kind)
        self.standard_gradient = torch.empty_like(standard) if wanted[0] else None
        self.perturbed_gradient = torch.empty_like(perturbed) if wanted[0] else None
        self.weight_gradient = torch.zeros_like(weight, dtype=kind) if wanted[1] else None
        self.gradient_wanted = any(wanted)
        self.offset = len(standard) - len(perturbed)
        assert self.offset >= 0 and arguments.labels.shape == arguments.clm_weights.shape == (len(standard),)
        assert (arguments.view_weights is None and not len(perturbed)) or len(arguments.view_weights) == len(perturbed)

    def total(self) -> Tensor:
        """The weighed sum of everything."""
        arguments = self.arguments
        total = (self.clm * self._clm_weights(slice(None))).sum()
        if len(self.view):
            total = total + (self.view * arguments.view_weights).sum()
        if arguments.teacher is not None:
            total = total + (self.teacher * arguments.teacher.weights).sum()
        return total

    def _clm_weights(self, rows: slice) -> Tensor:
        weights = self.arguments.clm_weights[rows].to(self.clm.dtype)
        if self.arguments.reweigh is None:
            return weights
        return weights * self.arguments.reweigh(self.clm[rows], rows)

    def run(self) -> None:
        """Fill values and gradients, a chunk at a time."""
        arguments = self.arguments
        temperatures, other = {"view": arguments.divergence.temperature}, None
        if isinstance(arguments.teacher, KnownTopK):
            temperatures["known teacher"] = arguments.teacher.divergence.temperature
        elif arguments.teacher is not None:
            temperatures["teacher"], other = arguments.teacher.divergence.temperature, arguments.teacher.weight.dtype
        counts = len(self.standard), len(self.perturbed)
        chunks = plan_chunks(*counts, temperatures, arguments.shard, self.weight.dtype, arguments.chunk_bytes, other)
        workspace = Workspace(chunks, self.weight)
        for chunk in chunks:
            self._chunk(chunk, workspace)

    def _rows(self, chunk: Chunk) -> tuple[slice, slice]:
        """The chunk's tokens among the standard and among the perturbed ones."""
        return slice(chunk.start, chunk.stop), slice(chunk.start - self.offset, chunk.stop - self.offset)

    def _chunk(self, chunk: Chunk, workspace: Workspace) -> None:
        rows, again = self._rows(chunk)
        logits = workspace.logits(self.standard[rows], self.weight, "standard", chunk, self.arguments.logit_scale)
        owned, at_label = self._at_label(logits, self.arguments.labels[rows])
        readings, pairs = self._readings(chunk, workspace, Reading(logits))
        for name, (reading, temperatures) in readings.items():
            reading.exponentiate(temperatures, workspace.spare(name, chunk))
        normalisers, gathered, at_label = self._exchange(readings, pairs, at_label)
        self.clm[rows] = normalisers["standard", 1.0].log_sum - at_label
        for name, pair in pairs.items():
            student, other = ("perturbed", "standard") if name == "view" else ("standard", "teacher")
            heat = pair.settings.temperature
            p, q = normalisers[student, heat], normalisers.get((other, heat))
            value = pair.value(gathered[name], p, q, self.arguments.shard)
            (self.view[again] if name == "view" else self.teacher[rows]).copy_(value)
        if self.gradient_wanted:
            probabilities = normalisers["standard", 1.0].scale
            self._gradients(chunk, workspace, readings["standard"][0], probabilities, pairs, owned)

    def _readings(self, chunk: Chunk, workspace: Workspace, standard: Reading) -> tuple[dict, dict]:
        """Every reading of the chunk with the temperatures it is needed at, and the pairs that are compared."""
        arguments = self.arguments
        readings, pairs = {"standard": (standard, chunk.standard_temperatures)}, {}
        if chunk.paired:
            hidden = self.perturbed[self._rows(chunk)[1]]
            logits = workspace.logits(hidden, self.weight, "perturbed", chunk, arguments.logit_scale)
            perturbed = Reading(logits)
            readings["perturbed"] = (perturbed, (arguments.divergence.temperature,))
            pairs["view"] = _pair(perturbed, standard, arguments.divergence, workspace.block("view", chunk))
        if isinstance(arguments.teacher, KnownTopK):
            memory = workspace.block("distill", chunk)
            pairs["teacher"] = KnownTopKPair(standard, arguments.teacher, self._rows(chunk)[0], arguments.shard, memory)
        elif arguments.teacher is not None:
            teacher = arguments.teacher
            hidden, weight = teacher.hidden[chunk.start : chunk.stop], teacher.weight[: arguments.shard.columns]
            other = Reading(workspace.logits(hidden, weight, "teacher", chunk, teacher.logit_scale))
            readings["teacher"] = (other, (teacher.divergence.temperature,))
            pairs["teacher"] = _pair(standard, other, teacher.divergence, workspace.block("distill", chunk))
        return readings, pairs

    def _at_label(self, logits: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Whether and in which column this rank holds each label [c] each, and the label's logit there, else 0 [c]."""
        shard = self.arguments.shard
        local = (labels >= shard.vocab_start) & (labels < shard.vocab_start + shard.columns)
        column = torch.where(local, labels - shard.vocab_start, 0).unsqueeze(-1)
        if not shard.columns:
            return (local, column), logits.new_zeros(len(logits))
        return (local, column), torch.where(local, logits.gather(-1, column).squeeze(-1), 0)

    def _exchange(self, readings: dict, pairs: dict, at_label: Tensor):
        """The chunk's one collective: normalisers by reading and temperature, every pair's share, label logit - max."""
        shard = self.arguments.shard
        sent, places = [at_label], []
        for name, (reading, temperatures) in readings.items():
            for temperature in temperatures:
                places.append((name, temperature, len(sent)))
                sent += [reading.maxima, reading.exponentials[temperature].sum(dim=-1)]
        ends = {}
        for name, pair in pairs.items():
            statistics = pair.statistics()
            ends[name] = slice(len(sent), len(sent) + len(statistics))
            sent += statistics
        gathered = gather_statistics(torch.stack(sent), shard)  # [ranks, k, c]
        normalisers = {
            (name, temperature): Normaliser.of(gathered[:, at], gathered[:, at + 1], temperature, shard)
            for name, temperature, at in places
        }
        largest = gathered[:, places[0][2]].amax(dim=0)
        return (
            normalisers,
            {name: gathered[:, where] for name, where in ends.items()},
            gathered[:, 0].sum(dim=0) - largest,
        )

    def _gradients(self, chunk: Chunk, workspace: Workspace, standard: Reading, scale: Tensor, pairs, owned) -> None:
        """Form d total / d logits of both readings in the workspace, and multiply them away.

        p = exponentials x scale [c].
        """
        arguments, kind = self.arguments, self.clm.dtype
        rows, again = self._rows(chunk)
        # Pairs first: they still read the standard view's exponentials.
        if chunk.paired:
            pairs["view"].gradient(arguments.view_weights[again].to(kind) * arguments.logit_scale)
        if arguments.teacher is not None:
            distilled = pairs["teacher"].gradient(arguments.teacher.weights[rows].to(kind) * arguments.logit_scale)
        weights = self._clm_weights(rows) * arguments.logit_scale
        gradient = standard.exponentials[1.0].mul_((weights * scale).unsqueeze(-1))  # weights x p
        if arguments.shard.columns:
            local, column = owned
            gradient.scatter_add_(-1, column, (-weights * local).unsqueeze(-1))
        if arguments.teacher is not None:
            gradient.add_(distilled)
        self._multiply(chunk, workspace)

    def _multiply(self, chunk: Chunk, workspace: Workspace) -> None:
        """d hidden = G W and dW += G^T hidden, for one reading or both at once."""
        rows, again = self._rows(chunk)
        gradient = workspace.gradient(chunk)  # [c or 2c, columns], in the weight's type
        if self.standard_gradient is not None:
            if chunk.paired:
                self.standard_gradient[rows], self.perturbed_gradient[again] = (gradient @ self.weight).chunk(2)
            else:
                torch.mm(gradient, self.weight, out=self.standard_gradient[rows])
        if self.weight_gradient is not None:
            hidden = self.standard[rows]
            if chunk.paired:
                hidden = torch.cat([hidden, self.perturbed[again]])
            workspace.accumulate(self.weight_gradient[: len(self.weight)], gradient, hidden)


def _pair(student: Reading, teacher: Reading, settings: Divergence, memory: Tensor) -> DensePair | TopKPair:
    if settings.top_k is None:
        return DensePair(student, teacher, settings, memory)
    return TopKPair(student, teacher, settings, memory)
