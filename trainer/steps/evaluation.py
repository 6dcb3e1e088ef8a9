"""How many of the held-out sequences an evaluation takes, so that it costs little of the training that follows it."""

from __future__ import annotations

import math

from trainer.options import Options

SHARE = 0.05  # of the training up to the next evaluation
FIRST_STEPS = 1  # that the evaluation before step 1 may cost
# A backward pass computes twice what a forward pass does (Kaplan et al., arXiv 2001.08361, section 2.1).
FORWARDS = 3
LEAST = 0.25  # of a global batch, even where a training is that short


def affordable_sequences(options: Options, steps: int, global_batch: int) -> int:
    """Return how many sequences each evaluation may take: the same number each time, on any number of ranks.

    `steps`: of the whole training; `global_batch`: sequences of all ranks in one of them. --eval_max_sequences decides
    where it is given.
    """
    if options.eval_max_sequences:
        return options.eval_max_sequences
    every = options.eval_steps or steps
    interval = every if every >= 1 else every * steps
    return math.ceil(global_batch * max(LEAST, FORWARDS * min(FIRST_STEPS, SHARE * interval)))
