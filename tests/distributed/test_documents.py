"""Packed documents through the real model: alone or in a pack they are the same, at every layout."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rpsd.loss.definitions import objective
from megatron_rpsd.positions import View, ViewSampler, draw_document_views
from tests.distributed import jobs
from tests.distributed.models import LENGTH, samples
from tests.distributed.plain_llama import PlainLlama
from tests.distributed.test_gradients import CP2, FULL, PP2, SP, TP2, largest_error

SEED, WEIGHT = 11, 0.7
PACK = [(5, 11, 1, 15), (LENGTH,), (1, 1, 30), (8, 8, 8, 8)]  # borders on, beside and far from those of zigzag chunks
RPSD = ["--objective", "rpsd", "--rpsd-kl-weight", str(WEIGHT), "--rpsd-seed", str(SEED)]
MASKED = ["--packing", "document-mask"]
ALONE = [*RPSD, *MASKED, "--perturb-documents"]
SPLIT = 16
VIEWS = [View(SPLIT, shift) for shift in (3, 9, 17, 32)]
LAYOUTS = {"one": (1, []), "cp2": (2, CP2), "tp2_cp2_sp": (4, TP2 + CP2 + SP + FULL), "pp2": (2, PP2)}


def packed(masked: bool = True) -> dict[str, torch.Tensor]:
    """Four windows with the documents of PACK."""
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in PACK])
    return {**samples(4, masked), "document_ids": ids, "sample_index": torch.arange(4)}


def documents_alone(folder, kind: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Every document as a sequence of its own, by the written-out model; each weighed by its kept tokens."""
    model, sample, sampler = PlainLlama(folder), packed(), ViewSampler(SEED, kind, LENGTH)
    total = clm = kl = kept = kept_suffix = 0
    for row, lengths in enumerate(PACK):
        start = 0
        for view, length in zip(draw_document_views(sampler, row, lengths).views, lengths, strict=True):
            tokens, labels, mask = (
                sample[name][row, start : start + length] for name in ("tokens", "labels", "loss_mask")
            )
            start += length
            if not mask.sum():
                continue
            causal = torch.ones(length, length).tril().bool()
            readings = [
                model.logits(tokens, ids, causal)[None] for ids in (torch.arange(length), view.position_ids(length))
            ]
            own = objective(*readings, labels[None], mask[None], torch.tensor([view.split]), WEIGHT)
            here, suffix = mask.sum(), mask[view.split :].sum()
            total, clm, kl = total + here * own[0], clm + here * own[1].item(), kl + suffix * own[2].item()
            kept, kept_suffix = kept + here, kept_suffix + suffix
    (total / kept).backward()
    gradients = {name: weight.grad for name, weight in model.weights.items()}
    return {"clm": (clm / kept).item(), "kl": (kl / kept_suffix).item()}, gradients


def packed_by_transformers(folder, reset: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The pack under VIEWS, one split a window, with an explicit 4D mask and explicit positions."""
    model, sample = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double(), packed()
    owner = sample["document_ids"]
    visible = (owner[:, :, None] == owner[:, None, :]).tril()
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))[:, None]
    place = torch.arange(LENGTH)
    begin = torch.stack([(owner[row] < owner[row][:, None]).sum(1) for row in range(4)])  # tokens of earlier documents
    readings = [
        model(input_ids=sample["tokens"], position_ids=ids - begin * reset, attention_mask=mask).logits
        for ids in (place.expand(4, -1), torch.stack([place + view.shift * (place >= SPLIT) for view in VIEWS]))
    ]
    splits = torch.full((4,), SPLIT)
    total, clm, kl = objective(*readings, sample["labels"], sample["loss_mask"], splits, WEIGHT)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"clm": clm.item(), "kl": kl.item()}, gradients


@pytest.fixture(scope="module")
def expected(tiny_llama):
    return {
        "skip": documents_alone(tiny_llama, "skip"),
        "cyclic": documents_alone(tiny_llama, "cyclic"),
        "window": packed_by_transformers(tiny_llama, reset=True),
    }


def check(found, wanted, losses=1e-5, gradients=4e-5):
    assert {name: found[0][name] for name in wanted[0]} == pytest.approx(wanted[0], rel=losses)
    # fp32 against fp64: KLs of documents of a few tokens are large, and their gradients small differences.
    assert largest_error(found[1], wanted[1]) < gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pack_equals_its_documents_alone(layout, ranks, tiny_llama, expected):
    world_size, flags = LAYOUTS[layout]
    assert expected["skip"][0]["kl"] > 0.01  # the views differ, so the comparison means something
    # Two rows a micro-batch: their borders differ.
    check(ranks.run(world_size, jobs.step, tiny_llama, [*ALONE, *flags], packed(), None, 2)[0], expected["skip"])
    if layout == "one":
        flags = ["--rpsd-perturbation", "cyclic"]
        check(ranks.run(1, jobs.step, tiny_llama, [*ALONE, *flags], packed(), None, 4)[0], expected["cyclic"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_split_a_window_equals_transformers_with_an_explicit_mask(layout, ranks, tiny_llama, expected):
    world_size, flags = LAYOUTS[layout]
    starts = (0, SPLIT) if layout == "one" else (SPLIT,)  # a whole second view, and the shared prefix
    for start in starts:
        found = ranks.run(world_size, jobs.step, tiny_llama, [*RPSD, *MASKED, *flags], packed(), VIEWS, 2, start)[0]
        check(found, expected["window"])


def test_positions_are_seen_where_attention_is_not_cut_and_only_there(ranks, tiny_llama, expected):
    """With attention cut, resetting positions is no more than rounding; without, it is another model."""
    cut = ranks.run(1, jobs.step, tiny_llama, [*RPSD, "--reset-attention-mask"], packed(), VIEWS)[0]
    check(cut, expected["window"])
    whole, reset = (
        ranks.run(1, jobs.step, tiny_llama, [*RPSD, *flags], packed(), VIEWS, 1, SPLIT)[0]
        for flags in ([], ["--reset-position-ids"])
    )
    for one, other in ((whole, cut), (reset, cut), (reset, whole)):
        assert abs(one[0]["clm"] - other[0]["clm"]) > 1e-3


def two_packs() -> list[dict[str, torch.Tensor]]:
    """A window whose second document reads two ways; loss on the other documents alone."""
    base = {name: value[:1] for name, value in packed(masked=False).items()}
    base["loss_mask"] = (base["document_ids"] != 1).float()
    changed = {**base, "tokens": torch.where(base["document_ids"] == 1, (base["tokens"] + 7) % 97, base["tokens"])}
    return [base, changed]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_does_not_feel_what_another_one_says(layout, ranks, tiny_llama):
    world_size, flags = LAYOUTS[layout]
    one, other = (ranks.run(world_size, jobs.step, tiny_llama, [*ALONE, *flags], pack, None)[0] for pack in two_packs())
    if layout == "one":
        assert one[0] == other[0]
        assert all(torch.equal(one[1][name], gradient) for name, gradient in other[1].items())
        seen, differently = (ranks.run(1, jobs.step, tiny_llama, RPSD, pack, None)[0] for pack in two_packs())
        assert abs(seen[0]["clm"] - differently[0]["clm"]) > 1e-3  # without masks it does
    check(one, other, 1e-6, 1e-6)
