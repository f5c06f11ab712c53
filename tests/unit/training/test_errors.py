"""Bad input ends a command with one line on stderr and exit code 2."""

from __future__ import annotations

import argparse

import pytest

from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_fail_prints_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        fail("--seq-length 10:\n   it must\tdivide by 4")
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert captured.err == "error: --seq-length 10: it must divide by 4\n"
    assert captured.out == ""


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("13", 0)])
def test_a_job_prints_once_and_every_rank_exits(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        fail("reason")
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_value_error_becomes_one_line(capsys):
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise ValueError("--rpsd-max-shift 0: choose at least 1")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --rpsd-max-shift 0: choose at least 1\n"


@pytest.mark.parametrize("error", [AssertionError("ours"), RuntimeError("torch's"), KeyError("k")])
def test_other_errors_keep_their_traceback(error, capsys):
    with pytest.raises(type(error)) as raised, one_line_errors():
        raise error
    assert raised.value is error
    assert capsys.readouterr().err == ""


def test_nothing_wrong_says_nothing(capsys):
    with one_line_errors():
        pass
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "x"], "error: argument --size: invalid int value: 'x'\n"),
        ([], "error: the following arguments are required: --size\n"),
    ],
)
def test_a_quiet_parser_leaves_its_usage_out(argv, message, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    assert quiet_parser(parser) is parser
    with pytest.raises(SystemExit) as left:
        parser.parse_args(argv)
    assert left.value.code == 2
    assert capsys.readouterr().err == message


def test_a_quiet_parser_still_parses():
    parser = quiet_parser(argparse.ArgumentParser())
    parser.add_argument("--size", type=int)
    assert parser.parse_args(["--size", "3"]).size == 3
