"""The models of a seed: what each starts from, reads and learns by, and its command line.

    base-THETA     pre-trained at 64 tokens          -> students, by schedule
    teacher-base   the same with other seeds         -> teacher, extended to 512 tokens on truly long documents
    students       extended to 512 tokens on packed short samples, by cross-entropy (CE) or the teacher's logits (KD)

A RoPE schedule is a base's theta and its students'. The phases of a schedule are runs of their own here, so that
students share their base; `--rope-phases` is the same in one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.lab.arms import LOOP_SWITCHES, common_flags, words
from examples.lab.settings import MODEL_FLAGS, MODEL_SWITCHES, Phase
from examples.short_data_long_context.data import TEACHER_SEEDS
from examples.short_data_long_context.settings import LARGE, MIDDLE, SMALL, Settings

CE = ("--objective", "standard")
KD = ("--objective", "distill", "--distill-kl-weight", "1", "--distill-ce-weight", "0")
CE_AND_KD = ("--objective", "distill", "--distill-kl-weight", "1", "--distill-ce-weight", "1")
ISO = (*KD, "--teacher-document-mask")


@dataclass(frozen=True)
class Model:
    """A trained model of a seed.

    Attributes:
        title: in figures and tables.
        theta: RoPE base that it is trained under.
        stream: that it reads.
        start: the model that it starts from; None: random weights.
        objective: flags; a teacher's checkpoint is added where they distill.
    """

    title: str
    theta: int
    stream: str
    start: str | None = None
    objective: tuple[str, ...] = CE

    @property
    def distils(self) -> bool:
        return self.objective != CE

    @property
    def needs(self) -> tuple[str, ...]:
        """The models that must be there first."""
        return (*((self.start,) if self.start else ()), *(("teacher",) if self.distils else ()))


def _base(theta: int) -> Model:
    return Model(f"base, theta {theta:,}", theta, "base")


def _student(title: str, start: int, theta: int, objective: tuple[str, ...]) -> Model:
    return Model(title, theta, "packed", f"base-{start}", objective)


MODELS: dict[str, Model] = {
    "teacher-base": Model("teacher's base", SMALL, "teacher-base"),
    f"base-{SMALL}": _base(SMALL),
    "teacher": Model("teacher (long documents)", LARGE, "long", "teacher-base"),
    "phase-ce": _student("phase CE", SMALL, LARGE, CE),
    "phase-kd": _student("phase KD", SMALL, LARGE, KD),
    "phase-ce-kd": _student("phase CE + KD", SMALL, LARGE, CE_AND_KD),
    "phase-kd-iso": _student("phase KD, iso teacher", SMALL, LARGE, ISO),
    f"base-{LARGE}": _base(LARGE),
    "large-ce": _student("large CE", LARGE, LARGE, CE),
    "large-kd": _student("large KD", LARGE, LARGE, KD),
    "small-ce": _student("small CE", SMALL, SMALL, CE),
    "small-kd": _student("small KD", SMALL, SMALL, KD),
    f"base-{MIDDLE}": _base(MIDDLE),
    "phase-10000-kd": _student("phase from 10,000, KD", MIDDLE, LARGE, KD),
    "small-10000-kd": _student("small = 10,000, KD", MIDDLE, MIDDLE, KD),
}
BASES = tuple(name for name, model in MODELS.items() if model.start is None)
STUDENTS = tuple(name for name, model in MODELS.items() if model.stream == "packed")
QUICK_STUDENTS = ("phase-ce", "phase-kd", "phase-kd-iso", "large-kd", "small-kd")


def needed_models(students: tuple[str, ...]) -> tuple[str, ...]:
    """The students with the teacher, which is always measured, and all that they start from, in the table's order."""
    wanted, found = {*students, "teacher"}, set()
    while wanted - found:
        found |= wanted
        wanted |= {name for model in found for name in MODELS[model].needs}
    return tuple(name for name in MODELS if name in wanted)


def phase_of(name: str, settings: Settings) -> Phase:
    """Sizes and steps of a model's training; its theta is the model's."""
    return settings.base if name in BASES else settings.teacher if name == "teacher" else settings.student


def arguments(name: str, settings: Settings, seed: int, folder: Path, data: Path) -> list[str]:
    """Command line of a model's training.

    Args:
        folder: of the seed; a model's checkpoint is a folder of its name there.
    """
    model, phase = MODELS[name], phase_of(name, settings)
    # A cache of its own: two runs that build one index at the same time would read each other's halves.
    flags = common_flags(phase, phase.steps, seed, data / model.stream, data / "cache" / name, folder / name)
    flags |= {"--rotary-base": model.theta, "--seed": 1 + seed + (TEACHER_SEEDS if name.startswith("teacher") else 0)}
    flags["--ckpt-format"] = "torch_dist"  # which teachers and the instruments read
    if model.start is None:
        start = [*words(MODEL_FLAGS), *MODEL_SWITCHES, "--max-position-embeddings", str(phase.seq_length)]
    else:
        start = ["--use-checkpoint-args", "--pretrained-checkpoint", str(folder / model.start)]
    teacher = ["--teacher-checkpoint", str(folder / "teacher")] if model.distils else []
    return ["--device", "cpu", *start, *words(flags), *LOOP_SWITCHES, *model.objective, *teacher]
