"""Prepared files as tasks of lm-evaluation-harness (its `ruler` tasks draw other prompts and score QA otherwise).

    DIR/prepared_TASK_LENGTH.jsonl   id, prompt (whole, answer prefix included), outputs
    DIR/prepared_TASK_LENGTH.yaml    the task: greedy, as many tokens as RULER's, no stop words
    DIR/harness_task.py              reads the prompts and scores them; independent of this library

The folder can be moved and needs no network; the tag `prepared` names all of its tasks:
lm_eval --include_path DIR --tasks prepared ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rpsd.data.staging import staging_folder
from megatron_rpsd.evaluation import harness_task
from megatron_rpsd.evaluation.samples import Prepared, load_prepared

TAG = "prepared"
# What a result must carry to be compared with another one.
_STAMP = ("dialect", "edition", "seed", "samples", "tokenizer_sha256", "sha256")


def task_name(prepared: Prepared) -> str:
    """The task's name in the harness: letters, digits and underscores."""
    return re.sub(r"\W", "_", f"{TAG}_{prepared.task}_{prepared.length}")


def task_yaml(prepared: Prepared) -> str:
    """A task's definition. Its values are JSON, which YAML reads; what follows !function is a name."""
    name, manifest = task_name(prepared), prepared.manifest
    metric = f"string_match_{manifest['metric']}"
    stamp = {"version": 1, "length": prepared.length, **{field: manifest[field] for field in _STAMP}}
    lines = {
        "task": json.dumps(name),
        "tag": json.dumps(TAG),
        "custom_dataset": f"!function {harness_task.__name__.rpartition('.')[2]}.documents",
        "dataset_kwargs": json.dumps({"file": f"{name}.jsonl"}),
        "test_split": '"test"',
        "output_type": '"generate_until"',
        "doc_to_text": '"{{prompt}}"',
        "doc_to_target": '"{{outputs[0]}}"',
        "process_results": f"!function {harness_task.__name__.rpartition('.')[2]}.{metric}",
        "metric_list": json.dumps([{"metric": metric, "aggregation": "mean", "higher_is_better": True}]),
        "generation_kwargs": json.dumps(
            {"do_sample": False, "max_gen_toks": manifest["generated_tokens"], "until": []}
        ),
        "metadata": json.dumps(stamp),
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def export_harness(paths: Sequence[Path], output: Path) -> list[str]:
    """Write the folder, whole or not at all; returns the tasks' names.

    Args:
        paths: prepared files.
        output: a folder that does not exist, or is empty.

    Raises:
        ValueError: as `load_prepared`; a folder that holds something; two files of one task and length.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder: name another")
    names: list[str] = []
    with staging_folder(output) as scratch:
        made = scratch / "made"
        made.mkdir()
        for path in paths:
            prepared = load_prepared(path)
            name = task_name(prepared)
            if name in names:
                raise ValueError(f"--prepared {path}: another file has the same task and length, {name}")
            names.append(name)
            docs = ({"id": s.id, "prompt": s.prompt, "outputs": list(s.outputs)} for s in prepared.samples)
            (made / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
            (made / f"{name}.yaml").write_text(task_yaml(prepared), encoding="utf-8")
        source = Path(harness_task.__file__)
        (made / source.name).write_bytes(source.read_bytes())
        output.parent.mkdir(parents=True, exist_ok=True)
        made.replace(output)
    return names
