"""A storm of interrupts at random moments of an optimizer's calls, and what they leave behind.

Run as a program it prints a report: ``python storm.py FRONT_END INTERRUPTS SEED``.

All gradients are 1. So all elements of an array are alike, and what parameter, states and numbers are after t steps is
what they are in an optimizer that nobody disturbed.
"""

import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np

import fastopt

SIZES = (3, 70_000, 1)  # the second is enough for threads


class NumPy:
    """Two optimizers of arrays: one of two groups and dtypes, one whose rule carries numbers from step to step."""

    package: Any = fastopt

    def __init__(self, sizes=SIZES):
        self.params = [self.array(size, dtype) for dtype in ("float32", "float64") for size in (*sizes, *sizes)]
        cut = len(sizes)
        halves = [self.params[:cut], self.params[cut : 3 * cut]]
        self.opts = [
            self.package.Adagrad([{"params": half} for half in halves], lr=0.1),
            self.package.NAdam(self.params[3 * cut :], lr=0.1),
        ]
        self.lists = [self.params[: 3 * cut], self.params[3 * cut :]]
        self.grads = [[self.array(len(p), str(p.dtype).removeprefix("torch.")) + 1 for p in ps] for ps in self.lists]
        self.folder = tempfile.TemporaryDirectory()
        self.step()
        self.keep()

    def array(self, size, dtype):
        return np.zeros(size, dtype)

    def step(self, **options):
        for opt, grads in zip(self.opts, self.grads, strict=True):
            opt.step(grads, **options)

    def clipped(self):
        self.step(max_norm=np.inf)

    def keep(self):
        self.kept = [opt.state_dict() for opt in self.opts]

    def save(self):
        for i, (opt, params) in enumerate(zip(self.opts, self.lists, strict=True)):
            fastopt.save(f"{self.folder.name}/{i}", params, opt)

    def restore(self):
        for i, (opt, params) in enumerate(zip(self.opts, self.lists, strict=True)):
            if os.path.exists(f"{self.folder.name}/{i}"):  # else the first save was interrupted
                fastopt.load(f"{self.folder.name}/{i}", params, opt)

    def load(self):
        for opt, kept in zip(self.opts, self.kept, strict=True):
            opt.load_state_dict(kept)

    def grow(self):
        opt = self.package.Adam([self.array(3, "float32")])
        opt.add_param_group({"params": {"more": self.array(3, "float32")}})

    actions = (step, clipped, step, keep, load, step, save, step, restore, grow)

    def states(self):
        """Of every parameter."""
        return [state for opt in self.opts for state in opt.state.values()]


def torch_scene():
    """The same with tensors."""
    import torch

    import fastopt.torch

    class Torch(NumPy):
        package = fastopt.torch

        def array(self, size, dtype):
            return torch.zeros(size, dtype=getattr(torch, dtype))

        def step(self):
            for opt, params, grads in zip(self.opts, self.lists, self.grads, strict=True):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                opt.step()

        def grow(self):
            self.package.Adam([self.array(3, "float32")]).add_param_group({"params": [self.array(3, "float32")]})

        actions = (step, step, NumPy.keep, NumPy.load, step, grow)

        def states(self):
            return [opt.state[p] for opt, params in zip(self.opts, self.lists, strict=True) for p in params]

    return Torch


FRONT_ENDS = {"numpy": lambda: NumPy, "torch": torch_scene}


class Calm:
    """What every array and number is after t steps."""

    def __init__(self, kind):
        self.scene = kind((1, 1, 1))
        self.seen: list[list[dict[str, Any]]] = [[]]

    def after(self, t):
        while len(self.seen) <= t:
            pairs = zip(self.scene.params, self.scene.states(), strict=True)
            self.seen.append([{k: np.asarray(v).copy() for k, v in {"": p, **state}.items()} for p, state in pairs])
            self.scene.step()
        return self.seen[t]


def wrong(scene, calm):
    """What does not agree with the number of steps, if anything; the numbers of one optimizer must be equal."""
    states, first = scene.states(), len(scene.lists[0])
    counts = [int(state.get("step", 0)) for state in states]
    if len(set(counts[:first])) > 1 or len(set(counts[first:])) > 1:
        return f"counts {counts[:first]}, {counts[first:]}"
    for k, (p, state, t) in enumerate(zip(scene.params, states, counts, strict=True)):
        for name, value in {"": p, **state}.items():
            got, want = np.unique(np.asarray(value)).tolist(), calm.after(t)[k][name].tolist()
            if got != np.ravel(want).tolist():
                return f"parameter {k} {name or 'itself'} is {got}, after {t} steps {want}"
    return None


def storm(front_end, interrupts, seed):
    """How many interrupts fell into which call, and what was locked or torn after which line."""
    rng, fired = random.Random(seed), []

    def interrupt(*_):
        fired.append(1)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    kind = FRONT_ENDS[front_end]()
    calm, scene, times = Calm(kind), kind(), {}
    for action in (*scene.actions, *scene.actions):  # the second time without late imports
        began = time.perf_counter()
        action(scene)
        times[action] = time.perf_counter() - began
    report = {"interrupts": collections.Counter(), "locked": [], "torn": []}
    for n in range(interrupts):
        action, place = scene.actions[n % len(scene.actions)], ""
        fired.clear()
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1.5 * times[action]))
            while not fired:
                action(scene)
        except KeyboardInterrupt as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.endswith("storm.py")]
            place = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(frames))
        report["interrupts"][action.__name__] += 1
        try:
            if action.__name__ == "load":  # which brings the states of another time
                for p, state, k in zip(scene.params, scene.states(), range(100), strict=False):
                    np.asarray(p)[...] = calm.after(int(state["step"]))[k][""]
            torn = wrong(scene, calm)
            scene.step()
            torn = torn or wrong(scene, calm)
        except RuntimeError as error:
            report["locked"].append(f"{action.__name__}: {error} {place}")
        else:
            if torn is None:
                continue
            report["torn"].append(f"{action.__name__}: {torn} {place}")
        scene = kind()
    return report


if __name__ == "__main__":
    print(json.dumps(storm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
