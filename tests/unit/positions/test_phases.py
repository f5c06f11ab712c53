"""The schedule of a run in phases: what is typed, which phase reads a sample, and what is refused."""

from __future__ import annotations

import pytest

from megatron_rpsd.positions import Phase, PhaseSchedule, parse_phases

TYPED = "short:theta=10000,seq=2048,samples=20000;long:theta=500000,seq=8192"


def test_a_typed_schedule_is_read_and_written_again():
    schedule = parse_phases(TYPED)
    assert schedule.phases == (Phase("short", 10000, 2048, 20000), Phase("long", 500000, 8192))
    assert schedule.describe() == TYPED and schedule.window == 8192
    loose = " short : theta = 1e4 , samples=2e4, seq=2048 ; long:seq=8192,theta=5e5 ; "
    assert parse_phases(loose) == schedule
    assert parse_phases("a:theta=10,seq=4,data=x/y:z").phases[0].data == "x/y:z"


def test_every_sample_belongs_to_the_phase_that_a_walk_over_the_run_gives_it():
    phases = (Phase("a", 10, 4, 6, "x"), Phase("b", 10, 4, 2), Phase("c", 20, 8, 4, "x"), Phase("d", 30, 8))
    schedule = PhaseSchedule(phases)
    walked, read = [], {"x": 0, None: 0}
    for phase in phases:
        for _ in range(phase.samples or 5):
            walked.append((phases.index(phase), (phase.data, read[phase.data])))
            read[phase.data] += 1
    assert [(schedule.at(index), schedule.place(index)) for index in range(17)] == walked
    assert schedule.streams(17) == read
    assert schedule.streams(7) == {"x": 6, None: 1}  # a run that ends in the second phase


def test_without_data_of_its_own_a_phase_reads_on_in_the_runs_stream():
    schedule = parse_phases("a:theta=10,seq=4,samples=6;b:theta=10,seq=8,samples=3;c:theta=10,seq=8")
    assert [schedule.place(index) for index in range(20)] == [(None, index) for index in range(20)]


MALFORMED = {
    "": "is empty",
    ";": "is no phase",
    "theta=10,seq=4": "is no phase",
    ":theta=10,seq=4": "is no phase",
    "a:theta=10": "seq missing",
    "a:samples=3": "theta and seq missing",
    "a:theta=10,seq=4,": "not KEY=VALUE",
    "a:theta=10,seq=": "not KEY=VALUE",
    "a:theta=10,seq=4,length=3": "no key length",
    "a:theta=10,theta=20,seq=4": "theta is given twice",
    "a:theta=ten,seq=4": "theta=ten must be a whole number",
    "a:theta=10.5,seq=4": "theta=10.5 must be a whole number",
    "a:theta=inf,seq=4": "theta=inf must be a whole number",
    "a:theta=nan,seq=4": "theta=nan must be a whole number",
    "a:theta=1,seq=4": "theta=1 must be greater than 1",
    "a:theta=10,seq=1": "seq=1 must be at least 2",
    "a:theta=10,seq=4,samples=0;b:theta=10,seq=4": "samples=0 must be at least 1",
    "a:theta=10,seq=4,samples=-8;b:theta=10,seq=4": "samples=-8 must be at least 1",
    "a:theta=10,seq=4,samples=4;a:theta=20,seq=4": "a is named 2 times",
    "a:theta=10,seq=4;b:theta=20,seq=4": "a: samples=N is missing",
    "a:theta=10,seq=8,samples=4;b:theta=20,seq=4": "shrinks from seq=8 in a to seq=4 in b",
    "a:theta=10,seq=4,samples=4;;b:theta=20,seq=4": "is no phase",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_phases_are_one_line(text):
    with pytest.raises(ValueError, match="--rope-phases") as refused:
        parse_phases(text)
    assert MALFORMED[text] in str(refused.value) and "\n" not in str(refused.value)


RUNS = {
    "fits": (TYPED, (8192, 4, 16, 30000), None),
    "no_end": (TYPED, (8192, 4, 16, None), None),
    "last_agrees": (TYPED + ",samples=10000", (8192, 4, 16, 30000), None),
    "last_differs": (TYPED + ",samples=9999", (8192, 4, 16, 30000), "20000 + samples=9999 = 29999"),
    "no_room": (TYPED, (8192, 4, 16, 20000), "start at sample 20000, and the run ends after 20000"),
    "window": (TYPED, (4096, 4, 16, 30000), "--seq-length 4096 is not the longest window"),
    "unit": (TYPED, (8192, 48, 16, 30000), "= 48"),
    "border": (TYPED, (8192, 4, 48, 30000), "20000 % --global-batch-size 48 = 32; the nearest sizes are samples=19968 "
               "and samples=20016"),
    "first_border": ("a:theta=10,seq=4,samples=3;b:theta=10,seq=4", (4, 1, 8, 80), "the nearest sizes are samples=8"),
    "second_border": ("a:theta=10,seq=4,samples=8;b:theta=10,seq=4,samples=9;c:theta=10,seq=4", (4, 1, 8, 80),
                      "b: samples=9 ends at sample 17, inside a step: 17 % --global-batch-size 8 = 1; the nearest "
                      "sizes are samples=8 and samples=16"),
    "divides": ("a:theta=10,seq=12,samples=8;b:theta=10,seq=64", (64, 1, 8, 80), "64 % 12 = 4; the nearest lengths are "
                "8 and 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_schedule_must_fit_its_run(case):
    text, sizes, problem = RUNS[case]
    if problem is None:
        return parse_phases(text).check(*sizes)
    with pytest.raises(ValueError, match="--rope-phases") as refused:
        parse_phases(text).check(*sizes)
    assert problem in str(refused.value)


def test_a_resumed_run_may_change_its_future_and_not_its_past():
    before = parse_phases("a:theta=10,seq=4,samples=8;b:theta=20,seq=8,samples=8;c:theta=30,seq=8")
    other_future = parse_phases("a:theta=10,seq=4,samples=8;b:theta=20,seq=8,samples=16;c:theta=40,seq=8")
    other_past = parse_phases("a:theta=11,seq=4,samples=8;b:theta=20,seq=8,samples=8;c:theta=30,seq=8")
    other_window = parse_phases("a:theta=10,seq=4,samples=8;b:theta=20,seq=16")
    other_future.check_continues(before, 16)
    other_past.check_continues(before, 0)
    for schedule, consumed in ((other_future, 17), (other_past, 1), (other_window, 8)):
        with pytest.raises(ValueError, match="phases up to there must stay") as refused:
            schedule.check_continues(before, consumed)
        assert before.describe() in str(refused.value)
