"""A live teacher: a frozen model of its own size beside the student, in the same TP x CP x DP layout.

It is built from its checkpoint's saved arguments, without DDP and without an optimizer, when the first micro-batch
comes: the process groups stand then, and the student with its optimizer is already there. It reads under no_grad, and
what it hands to the loss are its final hidden states and this rank's rows of its output layer; its logits are formed a
chunk of tokens at a time by the fused loss.

Its vocabulary is padded as the student's is, whatever the checkpoint's padding, so that the shards align.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.utils.common_utils import print_rank_0
from torch import Tensor

from megatron_rpsd.model import RPSDModelConfig, ViewSequence, model_config_from_args
from megatron_rpsd.positions import View, rope_tables
from megatron_rpsd.training.batch import ViewBatch, make_view_batch
from megatron_rpsd.training.distillation import TeacherReading
from megatron_rpsd.training.forward_step import ForwardStep
from megatron_rpsd.training.model_memory import report_memory
from megatron_rpsd.training.objective import OutputLayer
from megatron_rpsd.training.packing import Packing
from megatron_rpsd.training.saved_checkpoint import checkpoint_folder, saved_arguments
from megatron_rpsd.training.token_identity import TokenIdentity, check_same_tokens, token_identity

# What makes a model, out of the arguments that its checkpoint saved; all else is the run's.
_MODEL_ARGUMENTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention", "num_query_groups",
    "kv_channels", "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent",
    "rotary_interleaved", "add_bias_linear", "add_qkv_bias", "swiglu", "squared_relu",
    "untie_embeddings_and_output_weights", "normalization", "layernorm_epsilon", "qk_layernorm",
    "layernorm_zero_centered_gamma", "apply_query_key_layer_scaling", "attention_dropout", "hidden_dropout",
)  # fmt: skip

# The run's own that a forward pass of one stage does without.
_WITHOUT = {
    "perform_initialization": False,  # every value is read from the checkpoint, and no random number drawn
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "fp16": False,
    "fp8_dot_product_attention": False,  # its heads may be of another size than FP8 attention takes
}


class LiveTeacher:
    """A frozen model that reads the standard view of what the student reads.

    Args:
        config: the teacher's model.
        folder: of one of its checkpoints.
        args: the run's arguments, for the report of memory; None: no report.

    Attributes:
        document_mask: its attention is cut at the borders of documents, whatever the student's is.
        model: None until `start`, then a GPTModel without a wrapper.
        identity: what its ids mean.
    """

    def __init__(
        self, config: RPSDModelConfig, folder: Path, identity: TokenIdentity, args: argparse.Namespace | None = None
    ) -> None:
        self.config, self.folder, self.identity, self._args = config, folder, identity, args
        self.document_mask = args is not None and bool(args.teacher_document_mask)
        self.inv_freq, self.attention_scaling = config.inverse_frequencies()
        self.model = None

    def start(self) -> None:
        """Build and load it. Every rank of the job calls it at the same time."""
        builder = self.config.get_builder_cls()(self.config)
        self.config.finalize()
        with _random_state_kept():
            model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
        model.to(device=torch.cuda.current_device(), dtype=self.config.transformer.params_dtype)
        model.requires_grad_(False)
        model.eval()
        for name, parameter in model.named_parameters():
            if "embedding" in name or "output_layer" in name:
                parameter.zero_()  # the checkpoint may hold fewer rows of padding than there are here
        metadata = dist_checkpointing.load_content_metadata(str(self.folder)) or {}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        with _random_state_kept():
            loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(self.folder))
        model.load_state_dict(loaded["model"])
        self.model = model

    def read(self, step: ForwardStep, student, sample: Mapping[str, Tensor]) -> TeacherReading:
        """Of a micro-batch of whole sequences [b, L], as `step` packs them; the first call starts the teacher.

        `student` is the model that is trained, for the report of memory; None where there is none.
        """
        if self.model is None:
            self.start()
            if student is not None and self._args is not None:
                report_memory(self._args, student, self.model)
        packing = dataclasses.replace(step.packing, perturb_documents=False)
        if self.document_mask:
            packing = dataclasses.replace(packing, attention=True)
        batch = _standard_view(step, sample, packing)
        inv_freq = self.inv_freq.to(batch.position_ids.device)
        cos, sin = rope_tables(batch.position_ids, inv_freq, self.attention_scaling)
        borders = batch.documents.borders if packing.attention else None
        sequence: ViewSequence = dataclasses.replace(step.sequence(batch), cos=cos, sin=sin, documents=borders)
        with torch.no_grad():
            return self.model(
                batch.tokens,
                None,
                None,
                packed_seq_params=sequence,
                output_processor=functools.partial(
                    _hand_over, self.config.real_vocab_size, pg_collection=self.model.pg_collection
                ),
                output_processor_context=batch,
            )


def _standard_view(step: ForwardStep, sample: Mapping[str, Tensor], packing: Packing) -> ViewBatch:
    rows, length = sample["tokens"].shape
    batch = make_view_batch(sample, [View.identity()] * rows, "standard", step.layout(None, length), packing=packing)
    return batch.to(torch.cuda.current_device())


def _hand_over(vocab_size: int, *, hidden_states: Tensor, context: ViewBatch, **given) -> TeacherReading:
    """GPTModel's `output_processor` hook: what the loss needs, before there are logits."""
    layer = OutputLayer.of_hook(vocab_size, context, **given)
    return TeacherReading(layer.readings(hidden_states)[0], layer.weight, layer.shard, layer.logit_scale)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave every random number that the student would draw as it is."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(states[3])


def teacher_from_args(args: argparse.Namespace) -> LiveTeacher:
    """The teacher of --teacher-checkpoint, not started.

    Raises:
        ValueError: no checkpoint, a model that is no teacher of this student, or another tokenizer or vocabulary.
    """
    folder = checkpoint_folder(args.teacher_checkpoint, flag="--teacher-checkpoint")
    saved = saved_arguments(folder)
    _check_model(args, saved)
    student = token_identity(args.tokenizer_type, args.tokenizer_model)
    if args.teacher_tokenizer is not None:
        teacher = token_identity("HuggingFaceTokenizer", args.teacher_tokenizer)
    else:
        teacher = token_identity(getattr(saved, "tokenizer_type", None), getattr(saved, "tokenizer_model", None))
    check_same_tokens(student, teacher)
    check_vocabulary(args, getattr(saved, "vocab_size", None), f"--teacher-checkpoint {args.teacher_checkpoint}")
    if saved.max_position_embeddings < args.seq_length:
        print_rank_0(
            f"warning: --teacher-checkpoint {args.teacher_checkpoint} was made for {saved.max_position_embeddings} "
            f"tokens and reads --seq-length {args.seq_length}: beyond its window a teacher says little"
        )
    return LiveTeacher(_model_config(args, saved), folder, teacher, args)


def check_vocabulary(args: argparse.Namespace, vocab_size: int | None, source: str) -> None:
    """Refuse a teacher of another vocabulary, and a --distill-top-k beyond it.

    Raises:
        ValueError: one line with both numbers.
    """
    if vocab_size is None:
        raise ValueError(
            f"{source} does not say its vocabulary (only its padded size): import the model with "
            "tools/convert_checkpoint.py import"
        )
    if vocab_size != args.vocab_size:
        raise ValueError(
            f"{source} has a vocabulary of {vocab_size}, the student one of {args.vocab_size}: logits are compared "
            "column by column; choose a teacher of the student's vocabulary, or cut (pad) the rows that no token of "
            "the tokenizer uses before import (only Megatron's own padding may differ)"
        )
    if args.distill_top_k is not None and args.distill_top_k > vocab_size:
        raise ValueError(f"--distill-top-k {args.distill_top_k} is more than the vocabulary's {vocab_size} tokens")


def _check_model(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    source = f"--teacher-checkpoint {args.teacher_checkpoint}"
    if getattr(saved, "num_experts", None):
        raise ValueError(f"{source} is a mixture of {saved.num_experts} experts: only dense teachers are supported")
    if getattr(saved, "multi_latent_attention", False):
        raise ValueError(f"{source} has multi-latent attention, which is not supported")
    if saved.position_embedding_type != "rope" or saved.rotary_percent != 1.0 or saved.normalization != "RMSNorm":
        raise ValueError(
            f"{source} has --position-embedding-type {saved.position_embedding_type} --rotary-percent "
            f"{saved.rotary_percent} --normalization {saved.normalization}: only rope over the whole head and RMSNorm "
            "are supported"
        )
    tp = args.tensor_model_parallel_size
    groups = saved.num_query_groups if saved.group_query_attention else saved.num_attention_heads
    if groups % tp or saved.num_attention_heads % tp:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide the teacher's {saved.num_attention_heads} heads and "
            f"{groups} query groups; it stands beside the student in the same layout, so choose a divisor of both"
        )


def _model_config(args: argparse.Namespace, saved: argparse.Namespace) -> RPSDModelConfig:
    """The teacher's model in the run's layout; `args` is left as it is."""
    merged = copy.copy(args)
    for name in _MODEL_ARGUMENTS:
        setattr(merged, name, getattr(saved, name))
    merged.rope_parameters = getattr(saved, "rope_parameters", None)
    for name, value in _WITHOUT.items():
        setattr(merged, name, value)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, None: args.params_dtype}
    merged.params_dtype = kinds[args.teacher_dtype]
    merged.bf16 = merged.params_dtype == torch.bfloat16
    if args.teacher_dtype == "fp8":
        merged.transformer_impl, merged.fp8, merged.fp8_recipe = "transformer_engine", "hybrid", "tensorwise"
    elif args.teacher_dtype is not None:
        merged.fp8 = None
    return model_config_from_args(merged)


__all__ = ["LiveTeacher", "check_vocabulary", "teacher_from_args"]
