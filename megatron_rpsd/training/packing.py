"""How the documents packed into one window see each other: three switches, and views of documents of their own.

Two documents a and b, <e> their EOD token, in a window of L = 8 (an EOD token belongs to the document that it ends):

    tokens                        a  a  a <e> b  b  b <e>

    attention    whole window            cut (--reset-attention-mask)
                 1                       1
                 1 1                     1 1
                 1 1 1                   1 1 1
                 1 1 1 1                 1 1 1 1
                 1 1 1 1 1               . . . . 1
                 1 1 1 1 1 1             . . . . 1 1
                 1 1 1 1 1 1 1           . . . . 1 1 1
                 1 1 1 1 1 1 1 1         . . . . 1 1 1 1

    positions    continuous       0  1  2  3  4  5  6  7
                 reset            0  1  2  3  0  1  2  3       (--reset-position-ids)

    loss         every token      1  1  1  1  1  1  1  1
                 borders masked   1  1  1  0  1  1  1  0       (--eod-mask-loss)

The flags and their meanings are Megatron's. Whole window, continuous and every token is the paper's setting (arXiv
2604.14339), `--packing concatenate`; cut, reset and masked is `--packing document-mask` (the other setting of arXiv
2604.06070). A border token predicts the first token of the next document, of which it knows nothing.

Where attention is cut, resetting positions changes rounding alone: RoPE sees differences of positions. For the same
reason one split for the whole window then perturbs the document that it falls into and no other, and the KL's mean over
the suffix is nearly all zeros. `--perturb-documents` gives every document a split and a shift of its own
(`positions.documents`), and the objective is that of the documents as sequences of their own, each weighed by its kept
tokens. With N_d kept tokens in document d, M_d of them at or after its split, N = sum N_d:

    L = 1/N sum_d [ sum_i CLM_i + weight x N_d / M_d x sum_{i >= s_d} KL_i ]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpsd.data.manifest import read_manifest
from megatron_rpsd.positions import SPLIT_VIEWS, Documents

PACKINGS = ("concatenate", "document-mask")
WINDOWS_LOOKED_AT = 64
"""Windows that are read before training starts, to say how they are packed."""


@dataclass(frozen=True)
class Packing:
    """The switches of a run; by default the paper's setting.

    Attributes:
        attention: cut at document borders, not causal over the whole window.
        positions: reset at each document, not continuous.
        loss: border tokens are masked. (Datasets do that; it is here to be said.)
        perturb_documents: a view for each document, not one for the whole sequence.
    """

    attention: bool = False
    positions: bool = False
    loss: bool = False
    perturb_documents: bool = False

    @property
    def reads_documents(self) -> bool:
        """Whether samples must say which document each token belongs to."""
        return self.attention or self.positions or self.perturb_documents

    def documents(self, sample: Mapping[str, Tensor]) -> Documents | None:
        """Documents of a micro-batch, out of its `document_ids` [b, L]; None where the run does not ask for them."""
        return Documents.of_ids(sample["document_ids"]) if self.reads_documents else None


CONCATENATED = Packing()
"""The paper's setting: documents see each other."""


def add_packing_arguments(group) -> None:
    """Add the flags to the parser's group."""
    group.add_argument(
        "--packing", choices=PACKINGS, default=None,
        help="concatenate (default): attention and positions run on over the documents of a window; document-mask: "
        "--reset-attention-mask --reset-position-ids --eod-mask-loss together, the default under --sft, where the "
        "documents are a line's conversations. Documents end with the tokenizer's EOD token.",
    )  # fmt: skip
    group.add_argument(
        "--perturb-documents", action="store_true",
        help="Draw a split and a shift for every document, not one for the whole sequence (skip and cyclic views, "
        "--rpsd-execution full); needs --packing document-mask or --reset-attention-mask.",
    )  # fmt: skip


def settle_packing(args: argparse.Namespace) -> None:
    """Turn --packing into Megatron's flags; a run of per-document views is a full one. Before `settle_arm`.

    Raises:
        ValueError: --packing concatenate beside a flag that undoes it.
    """
    if args.packing == "concatenate":
        for name in ("reset_attention_mask", "reset_position_ids", "dataloader_inter_document_masking"):
            if getattr(args, name, False):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"--packing concatenate {flag}: {flag} ends what concatenate asks for; leave one out")
    if getattr(args, "dataloader_inter_document_masking", False):
        # Megatron's newer name for both; told of it, its loop would wait for cu_seqlens.
        args.reset_attention_mask = args.reset_position_ids = True
        args.dataloader_inter_document_masking = False
    typed = args.reset_attention_mask or args.reset_position_ids
    if args.packing is None:
        args.packing = "document-mask" if args.conversations and not typed else "concatenate"
    if args.packing == "document-mask":
        args.reset_attention_mask = args.reset_position_ids = args.eod_mask_loss = True
    if args.perturb_documents:
        _check_perturbed_documents(args)


def _check_perturbed_documents(args: argparse.Namespace) -> None:
    if not args.reset_attention_mask:
        raise ValueError(
            "--perturb-documents perturbs documents that do not see each other: add --packing document-mask (or "
            "--reset-attention-mask)"
        )
    if args.objective in ("standard", "distill") or args.pose_sampling == "chunks":
        raise ValueError(
            "--perturb-documents draws a split and a shift for every document; --objective standard, "
            "--objective distill and --pose-sampling chunks have none: leave it out"
        )
    kind = args.rpsd_perturbation or "skip"
    if kind not in SPLIT_VIEWS:
        raise ValueError(
            f"--perturb-documents knows --rpsd-perturbation {' and '.join(SPLIT_VIEWS)}; {kind} views have no split: "
            "leave one of the two out"
        )
    if args.rpsd_execution == "shared-prefix":
        raise ValueError(
            "--rpsd-execution shared-prefix with --perturb-documents: documents have prefixes of their own, and only "
            "one prefix of the window can be shared; leave it out (full is the default here)"
        )
    for flag, value in (
        ("--rpsd-split-range", args.rpsd_split_range),
        ("--rpsd-split-density", args.rpsd_split_density),
    ):
        if value is not None:
            raise ValueError(f"{flag} places the split of a whole sequence; with --perturb-documents leave it out")
    if args.objective != "pose":
        args.rpsd_execution = "full"


def packing_from_args(args: argparse.Namespace) -> Packing:
    """The switches that the settled arguments describe."""
    return Packing(args.reset_attention_mask, args.reset_position_ids, args.eod_mask_loss, args.perturb_documents)


def check_document_ends(args: argparse.Namespace, eod: int | None, prefixes: Sequence[str]) -> None:
    """Refuse data whose documents cannot be told apart.

    Args:
        eod: the tokenizer's EOD token.
        prefixes: of the `.bin` and `.idx` files; those without a manifest are taken as they are.

    Raises:
        ValueError: no EOD token, or data that end their documents otherwise.
    """
    flag = "--reset-attention-mask/-position-ids"
    if args.packing == "document-mask":
        flag = "--packing document-mask"
    elif not (args.reset_attention_mask or args.reset_position_ids):
        flag = "--teacher-document-mask"
    if eod is None:
        raise ValueError(f"{flag}: the tokenizer {args.tokenizer_model} has no EOD token, which ends a document")
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        if manifest is not None and manifest.eod_id != eod:
            found = "none" if manifest.eod_id is None else f"token {manifest.eod_id}"
            raise ValueError(
                f"{flag}: documents of --data-path {prefix} end with {found}, the tokenizer's EOD token is {eod}; make "
                "the data again with tools/preprocess_data.py --append-eod and this model's tokenizer"
            )


def packing_sums(documents: Documents, loss_mask: Tensor) -> dict[str, Tensor]:
    """What is logged of a micro-batch's packing, as [sum, count] pairs.

    documents per sequence; long document share: of all tokens, those in documents longer than half of the sequence;
    masked border share: of all tokens, those before another document's first one, and without loss.

    Args:
        loss_mask: [b, L] of the whole sequences.
    """
    rows, length = loss_mask.shape
    lengths = [size for row in range(rows) for size in documents.lengths(row)]
    border = documents.starts().diff(dim=1) != 0
    masked = (border & (loss_mask[:, :-1] == 0)).sum().item()
    long = sum(size for size in lengths if 2 * size > length)
    return {
        "documents per sequence": torch.tensor([float(len(lengths)), float(rows)]),
        "long document share": torch.tensor([float(long), float(rows * length)]),
        "masked border share": torch.tensor([float(masked), float(rows * length)]),
    }


def describe_packing(packing: Packing, samples: Sequence[Mapping[str, Tensor]]) -> str:
    """One line for the log on the first windows of the training data.

    Args:
        samples: dataset samples with tokens, loss_mask and document_ids [L].
    """
    ids, mask = (torch.stack([sample[name] for sample in samples]) for name in ("document_ids", "loss_mask"))
    documents, length = Documents.of_ids(ids), ids.shape[1]
    sums = {name: (total / count).item() for name, (total, count) in packing_sums(documents, mask).items()}
    lengths = [size for row in range(len(samples)) for size in documents.lengths(row)]

    def share(least: int) -> float:
        return sum(size for size in lengths if size > least) / (len(samples) * length)

    borders = (sums["documents per sequence"] - 1) / length
    return (
        f"packing: attention {'cut at documents' if packing.attention else 'over the whole window'}, positions "
        f"{'reset' if packing.positions else 'continuous'}; the first {len(samples)} windows hold "
        f"{sums['documents per sequence']:.2f} documents each; {share(length // 16):.1%}, {share(length // 4):.1%} and "
        f"{share(length // 2):.1%} of the tokens stand in documents longer than {length // 16}, {length // 4} and "
        f"{length // 2}; {borders:.2%} stand at a border, {sums['masked border share']:.2%} there without loss"
    )
