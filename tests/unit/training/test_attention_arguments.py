"""Attention kernels and FP8 as command lines: what each settles on, and every refusal with its reason."""

from __future__ import annotations

import pytest

from megatron_rpsd.training import attention_arguments
from megatron_rpsd.training.arms import suffix_unit
from tests.unit.training.test_arms import parsed  # noqa: F401

# One layer of heads of 128 channels on 16-divisible widths; later flags win.
SHAPE = (
    "--hidden-size 256 --num-attention-heads 2 --kv-channels 128 --seq-length 1024 --max-position-embeddings 1024 "
    "--global-batch-size 8"
).split()
BF16 = [*SHAPE, "--bf16"]
FP8 = [*BF16, "--fp8-format", "hybrid"]
DPA = [*FP8, "--fp8-dot-product-attention", "--attention-kernel", "te", "--rpsd-execution", "full"]
TP2, CP2 = ["--tensor-model-parallel-size", "2"], ["--context-parallel-size", "2"]


@pytest.fixture
def machine(monkeypatch):
    """A machine with two H100s and all packages; a test may take some of it away."""

    def have(packages: tuple[str, ...] = ("flash_attn", "transformer_engine"), capability=(9, 0), flash="2.8.3.post1"):
        monkeypatch.setattr(attention_arguments, "_flash_version", lambda: flash)
        monkeypatch.setattr(attention_arguments, "_installed", lambda package: package in packages)
        monkeypatch.setattr(attention_arguments, "_capability", lambda: capability)

    have()
    monkeypatch.delenv("NVTE_DPA_FP8_RECIPE", raising=False)
    return have


def test_auto_is_torchs_own(parsed, machine):  # noqa: F811
    machine(packages=())
    args = parsed()
    assert args.attention_kernel == "sdpa" and not args.fp8_dot_product_attention and suffix_unit(args) == 1


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "te"])
def test_a_gpus_kernel_is_taken_on_a_gpu(kernel, parsed, machine):  # noqa: F811
    assert parsed(*BF16, "--attention-kernel", kernel).attention_kernel == kernel


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attention-kernel", "flash", "--device", "cpu"], "--attention-kernel flash needs a GPU .* --device cpu"),
        (["--attention-kernel", "te", "--device", "cpu"], "--attention-kernel te needs a GPU"),
        (["--fp8-format", "hybrid", "--device", "cpu"], "--fp8-format hybrid needs a GPU"),
        (["--attention-kernel", "cudnn"], "--attention-kernel cudnn attends in 16 bits .* add --bf16"),
        ([*BF16, "--attention-kernel", "te", "--kv-channels", "12"], "multiples of 8; this model's have 12"),
        ([*BF16, "--attention-kernel", "flash", "--kv-channels", "320"], "at most 256 channels .* have 320"),
        (
            [*BF16, *CP2, "--attention-kernel", "te", "--cp-comm-type", "a2a+p2p"],
            r"--cp-comm-type a2a\+p2p .* choose of p2p, all_gather, a2a",
        ),
        (
            [*BF16, *CP2, "--attention-kernel", "te", "--cp-comm-type", "a2a", "--group-query-attention",
             "--num-query-groups", "1"],
            "1 key heads / TP 1 / CP 2 = 0.5 is not whole; use p2p",
        ),
        ([*BF16, "--fp8-dot-product-attention"], "without --fp8-format: Megatron would attend in bf16"),
        ([*SHAPE, "--fp8-format", "hybrid"], "--fp8-format hybrid needs --bf16"),
        ([*FP8, "--transformer-impl", "local"], "the others would stay in bf16; give --transformer-impl"),
        ([*FP8, "--hidden-size", "264"], "multiples of 16 .*--fp8-recipe delayed.*--hidden-size is 264 / 1 = 264"),
        ([*FP8, *TP2, "--ffn-hidden-size", "48"], "--ffn-hidden-size / TP is 48 / 2 = 24"),
        ([*FP8, "--fp8-recipe", "mxfp8", "--hidden-size", "272"], "multiples of 32 .*is 272"),
        ([*FP8, "--seq-length", "1000"], r"--seq-length 1000 .* of 16, .* CP x 16 = 16; the next value is 1008"),
        (
            [*FP8, *CP2, *TP2, "--sequence-parallel", "--rpsd-split-granule", "96"],
            "--rpsd-split-granule 96 .* suffixes divide by CP x TP x 16 = 64; the next value is 128",
        ),
        (
            [*FP8, "--longce", "--longce-context", "40", "--longce-stride", "10", "--objective", "standard"],
            r"50 tokens of a window must divide by 16 x CP .*FP8\) = 16",
        ),
        ([*FP8, "--fp8-dot-product-attention"], "--attention-kernel sdpa: only te attends in FP8"),
        ([*DPA, "--fp8-recipe", "blockwise"], "--fp8-recipe blockwise: .* would attend in bf16; use delayed"),
        (
            [*FP8, "--fp8-dot-product-attention", "--attention-kernel", "te"],
            "with a split at 512 .* 1024 - 512 = 512 queries over 1024 keys.* give --rpsd-execution full",
        ),
        ([*DPA, "--reset-attention-mask"], "with masked documents .* give --packing concatenate"),
        ([*DPA, "--packing", "document-mask"], "with masked documents .* give --packing concatenate"),
        ([*DPA, "--recompute-granularity", "selective"], "outside of FP8, so the gradient would be bf16's"),
        ([*DPA, "--fp8-recipe", "tensorwise"], "on Hopper FP8 attention trains with delayed scaling alone"),
        ([*DPA, "--kv-channels", "64"], "on Hopper FP8 attention trains heads of 128 channels, .* have 64"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(flags, message, parsed, machine, monkeypatch):  # noqa: F811
    machine()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message) as refused:
        parsed(*flags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ([*BF16, "--attention-kernel", "flash"], "flash_attn"),
        ([*BF16, "--attention-kernel", "te"], "transformer_engine"),
        (FP8, "transformer_engine"),
    ],
)
def test_a_missing_package_is_named_when_it_is_asked_for(flags, package, parsed, machine):  # noqa: F811
    machine(packages=())
    with pytest.raises(ValueError, match=f"needs the Python package {package}, which is not installed"):
        parsed(*flags)


def test_a_flash_attn_with_another_mask_is_refused(parsed, machine):  # noqa: F811
    machine(flash="2.0.9")
    with pytest.raises(ValueError, match="flash-attn package is 2.0.9, and before 2.1"):
        parsed(*BF16, "--attention-kernel", "flash")


@pytest.mark.parametrize(
    ("capability", "flags", "message"),
    [
        ((8, 0), FP8, "needs a GPU of compute capability 8.9 or above, and this one has 8.0"),
        ((8, 9), DPA, "no FP8 attention for compute capability 8.9"),
        ((12, 0), DPA, "no FP8 attention for compute capability 12.0"),
        (
            (10, 0),
            [*DPA, "--kv-channels", "72"],
            "FP8 attention trains heads of at most 128 channels in multiples of 16",
        ),
    ],
)
def test_a_device_without_the_kernel_is_refused(capability, flags, message, parsed, machine):  # noqa: F811
    machine(capability=capability)
    with pytest.raises(ValueError, match=message):
        parsed(*flags)


def test_blackwell_attends_by_current_scaling_too(parsed, machine):  # noqa: F811
    machine(capability=(10, 0))
    assert parsed(*DPA, "--fp8-recipe", "tensorwise", "--kv-channels", "64").fp8_dot_product_attention


def test_another_recipe_in_the_environment_is_refused(parsed, machine, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", "F16")
    with pytest.raises(ValueError, match="NVTE_DPA_FP8_RECIPE=F16 in the environment"):
        parsed(*DPA)


@pytest.mark.parametrize("objective", ["standard", "pose"])
def test_single_views_take_fp8_attention_without_more_ado(objective, parsed, machine):  # noqa: F811
    flags = [*FP8, "--fp8-dot-product-attention", "--attention-kernel", "te", "--objective", objective]
    args = parsed(*flags)
    assert args.fp8 == "hybrid" and args.fp8_recipe == "delayed" and args.fp8_dot_product_attention


def test_megatrons_configuration_hears_of_fp8_attention(parsed, machine):  # noqa: F811
    """Its parser has no such flag; the field is filled from ours."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert "fp8_dot_product_attention" in TransformerConfig.__dataclass_fields__
    assert vars(parsed(*DPA))["fp8_dot_product_attention"] is True


def test_default_granules_hold_in_fp8(parsed, machine, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "8")
    short = parsed(*FP8, *TP2, *CP2, "--sequence-parallel", "--seq-length", "256")
    assert suffix_unit(short) == 64 and short.rpsd_split_granule == 64
    assert parsed(*BF16, *TP2, *CP2, "--sequence-parallel", "--seq-length", "256").rpsd_split_granule == 8
    assert parsed(*FP8, "--seq-length", "65536").rpsd_split_granule % 16 == 0
