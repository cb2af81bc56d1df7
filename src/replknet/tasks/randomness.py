"""Random state as a pure function of where training stands, so that nothing about it needs saving.

Before micro-batch b of epoch e, every generator of process r is seeded from (seed, r, e, b). Mixup, drop path and
dropout therefore draw the same numbers in a run that was killed and resumed as in one that was not.
"""

import random

import numpy as np
import torch


def seed_batch(seed: int, rank: int, epoch: int, batch: int) -> None:
    """Seed Python's, NumPy's and torch's (every device's) generators for one micro-batch."""
    words = np.random.SeedSequence((seed, rank, epoch, batch)).generate_state(3, np.uint32)
    python, numpy, torch_ = (int(word) for word in words)
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_)
