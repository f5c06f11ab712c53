import errno
import fcntl
import os

import pytest

from megatron_rpsd.checkpoint.partial_folder import partial_folder, remove_leftovers


def test_the_folder_appears_at_the_end_and_leaves_nothing_else(tmp_path):
    with partial_folder(tmp_path / "deep" / "out") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "file").write_text("content")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "part" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError("wrong"), SystemExit(3)])
def test_whatever_is_raised_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        with partial_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("content")
            raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"--output .*out: no space left on the device; nothing is left there"):
        with partial_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "no space")
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        with partial_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    """A writer lives as long as it holds the lock; the system frees a dead process's."""
    for name in ("dead", "live"):
        (tmp_path / f".out.partial-{name}").mkdir()
        (tmp_path / f".out.partial-{name}" / "half").write_text("half")
        (tmp_path / f".out.partial-{name}.lock").touch()
    (tmp_path / ".outer.partial-x").mkdir()
    (tmp_path / ".outer.partial-x.lock").touch()  # of another output
    descriptor = os.open(tmp_path / ".out.partial-live.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    remove_leftovers(tmp_path / "out")
    others = {".outer.partial-x", ".outer.partial-x.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial-live", ".out.partial-live.lock", *others}
    os.close(descriptor)
    with partial_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_a_name_with_brackets_cleans_only_its_own(tmp_path):
    for name in (".a[b].partial-x", ".ab.partial-x"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").touch()
    remove_leftovers(tmp_path / "a[b]")
    assert {path.name for path in tmp_path.iterdir()} == {".ab.partial-x", ".ab.partial-x.lock"}
