"""--run-dir: what a start does to the folder, and that a look at its command line leaves everything as it is."""

from __future__ import annotations

from megatron.training.arguments import parse_args

from megatron_rpsd.runs.checkpoints import TRACKER, iteration_folder
from megatron_rpsd.runs.checksums import file_sums, write_checksums
from megatron_rpsd.runs.folder import RunFolder
from megatron_rpsd.training.arguments import add_rpsd_arguments
from megatron_rpsd.training.run_folder import settle_run_folder


def test_a_look_reads_no_checkpoint_and_sets_none_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main", "--run-dir", str(tmp_path)])
    # These checkpoints hold no arguments that could be compared with a resumed run's.
    monkeypatch.setattr("megatron_rpsd.training.run_folder.settle_resume", lambda *given: None)
    checkpoints = RunFolder(tmp_path).checkpoints
    for iteration in (10, 20, 30):
        folder = iteration_folder(checkpoints, iteration)
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(b"tensors")
        if iteration < 30:  # a run is writing the last one
            write_checksums(folder, file_sums(folder, ["__0_0.distcp"]))
    (checkpoints / TRACKER).write_text("20")
    (iteration_folder(checkpoints, 20) / "__0_0.distcp").write_bytes(b"tensorz")
    before = sorted(checkpoints.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("megatron_rpsd.runs.checksums.file_sum", lambda path: 1 / 0)
        args = parse_args(add_rpsd_arguments)
        settle_run_folder(args, starting=False)
    assert args.load == args.save == str(checkpoints) and sorted(checkpoints.rglob("*")) == before

    settle_run_folder(parse_args(add_rpsd_arguments))
    assert (checkpoints / TRACKER).read_text() == "10"
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == [
        "damaged-iter_0000020",
        "interrupted-iter_0000030",
        "iter_0000010",
    ]
