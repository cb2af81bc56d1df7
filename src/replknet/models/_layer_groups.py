"""Which layer-decay group a parameter belongs to.

The release counts, for layers 2-2-18-2: stem 0; stage 0 and transition 0: 1; stage 1 and transition 1: 2; stage 2:
3 + block // 4; transition 2: 11; stage 3: 12; norm, head and everything else: 13. The rule behind it, used for any
depth: two layers (four blocks) a group, a transition or a stage's own norm with the last group of its stage.
"""

import re
from collections.abc import Sequence

_STEM = re.compile(r"(?:^|\.)stem[._]")
_STAGE = re.compile(r"(?:^|\.)stages[._](\d+)\.(?:blocks\.(\d+)\.)?")
_TRANSITION = re.compile(r"(?:^|\.)transitions[._](\d+)\.")


def layer_group(name: str, layers: Sequence[int], *, coarse: bool = False) -> int:
    """Group of the parameter `name`, 0 the furthest from the head.

    Args:
        name: with any prefix (`module.`, `backbone.`, `model.`), in timm's feature wrappers too (`stages_0.blocks.1`).
        layers: layers a stage.
        coarse: one group a stage.
    """
    sizes = [1 if coarse else -(-n // 2) for n in layers]
    if _STEM.search(name):
        return 0
    if match := _STAGE.search(name):
        stage, block = int(match[1]), match[2]
        within = sizes[stage] - 1 if block is None else int(block) // 4
        return 1 + sum(sizes[:stage]) + min(within, sizes[stage] - 1)
    if match := _TRANSITION.search(name):
        return sum(sizes[: int(match[1]) + 1])
    return 1 + sum(sizes)


def num_layer_groups(layers: Sequence[int]) -> int:
    """How many groups there are; 14 for layers 2-2-18-2."""
    return layer_group("head.weight", layers) + 1
