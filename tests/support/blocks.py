"""Blocks of a GPU's threads without a GPU: greenlets, for the operating system's threads take 20 times as long."""

import random
import sys

import numpy as np


def take_turns(threads):
    """Run greenlets from barrier to barrier, where they switch to their parent, each time in another order."""
    order = random.Random(0)
    while threads:
        order.shuffle(threads)
        for thread in threads:
            thread.switch()
        threads = [thread for thread in threads if not thread.dead]


def shared_array(memory, shape, dtype):
    """A block's array, in place of the simulator's method: one for each line, but without its look at the
    whole stack, which takes half of all time."""
    frame = sys._getframe(1)
    place = frame.f_code, frame.f_lineno
    if place not in memory._allocations:
        memory._allocations[place] = np.empty(shape, str(dtype))
    return memory._allocations[place]
