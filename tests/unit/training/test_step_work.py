"""What is counted beside the student's own views: LongCE's windows and a live teacher, across documents."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_rpsd.positions import Documents
from megatron_rpsd.runs.flops import ModelShape, forward_flops
from megatron_rpsd.training.longce import LongCE
from megatron_rpsd.training.step_work import longce_flops, teacher_flops

SHAPE = ModelShape(3, 64, 96, 4, 2, 16, 97)
IDS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 8, [0] * 22])
"""Documents of two rows of 22 tokens."""


def test_windows_are_cut_where_the_documents_in_them_are():
    longce = LongCE(context=6, stride=4)
    batch = SimpleNamespace(layout=SimpleNamespace(length=22), splits=[0, 0], documents=Documents.of_ids(IDS))
    windows = Documents.of_ids(longce.windows(IDS)).borders  # as the windows are read, the last one filled up
    assert len(windows) == 2 * len(longce.window_starts(22)) and {borders[-1] for borders in windows} == {10}
    expected = sum(forward_flops(SHAPE, 10, borders=borders) for borders in windows)
    assert longce_flops(SHAPE, longce, batch, cut=True) == expected
    assert longce_flops(SHAPE, longce, batch, cut=False) == len(windows) * forward_flops(SHAPE, 10) > expected


def test_a_live_teacher_reads_each_row_once():
    sample = {"tokens": IDS, "document_ids": IDS}
    assert teacher_flops(SHAPE, sample, cut=False) == 2 * forward_flops(SHAPE, 22)
    cut = forward_flops(SHAPE, 22, borders=(0, 5, 14, 22)) + forward_flops(SHAPE, 22)
    assert teacher_flops(SHAPE, sample, cut=True) == cut
