"""The schedule of learning rate and weight decay that a resumed run must share with its checkpoint.

Megatron's scheduler compares the two after the model is built, on every rank, with an assertion. Here they are
compared first, by the flags that a user types.
"""

from __future__ import annotations

import argparse

_PLAIN = ("lr", "min_lr", "lr_decay_style", "weight_decay")


def schedule_of(args: argparse.Namespace) -> dict[str, list]:
    """What Megatron's scheduler is made of, by flag: [value as typed, what is compared].

    Lengths are compared in samples, as the scheduler counts, so that another batch size shows too. Values are plain, as
    they travel between ranks.
    """
    by_samples = bool(args.train_samples)
    kind, unit = ("samples", 1) if by_samples else ("iters", args.global_batch_size)
    total = getattr(args, f"train_{kind}")
    if not total:
        return {}
    decay = getattr(args, f"lr_decay_{kind}") or total
    schedule = {f"--train-{kind}": [total, total * unit], f"--lr-decay-{kind}": [decay, decay * unit]}
    if args.lr_warmup_fraction is not None:
        schedule["--lr-warmup-fraction"] = [args.lr_warmup_fraction, args.lr_warmup_fraction * decay * unit]
    else:
        warmup = getattr(args, f"lr_warmup_{kind}")
        schedule[f"--lr-warmup-{kind}"] = [warmup, warmup * unit]
    for name in _PLAIN:
        value = getattr(args, name)
        schedule[f"--{name.replace('_', '-')}"] = [value, value]
    return schedule


def check_schedule(args: argparse.Namespace, batch: int, saved: dict[str, list], source: str) -> None:
    """Refuse to go on from `source` by another schedule, unless a flag of Megatron's says which of the two counts.

    Args:
        batch: the global batch size that the run will have.
        saved: the checkpoint's `schedule_of`.

    Raises:
        ValueError: one line with both values and the flags.
    """
    if args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    typed = argparse.Namespace(**{**vars(args), "global_batch_size": batch})
    for flag, (value, compared) in schedule_of(typed).items():
        if flag not in saved or saved[flag][1] == compared:
            continue
        before = saved[flag][0]
        how = f"with {flag} {before}" if before != value else f"with another --global-batch-size than {batch}"
        raise ValueError(
            f"{flag} {value}: {source} was trained {how}: give --override-opt-param-scheduler to go on by what is "
            "typed, or --use-checkpoint-opt-param-scheduler to keep the checkpoint's schedule"
        )
