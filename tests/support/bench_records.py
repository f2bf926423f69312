"""Made-up records of benchmarks, for tests of the report: a plausible one, and one in which much is missing."""

import random

from bench.results import Record, Result, Timing, Verdict

MACHINE = {
    "processor": "Imaginary Xeon 6000", "cores": 2, "memory": 25_000_000_000, "cache": 33_554_432, "threads": 2,
    "instruction set": "x86-64-v4", "system": "Linux x86_64", "python": "3.12.1", "fastopt": "0.1.0", "numpy": "2.4.6",
    "torch": "2.13.0", "revision": "0123456789abcdef0123456789abcdef01234567", "date": "2026-11-21 10:00 UTC",
}  # fmt: skip
CHARTS = {"models": 5, "sizes": 1, "arrays": 1, "threads": 2, "rules": 1, "dtypes": 1, "options": 3, "startup": 2}
HOSTILE = "<script>throw Error('escaped badly')</script>"
MODELS = {
    "resnet50": (25_557_032, 161), "mobilenet-v3-large": (5_483_032, 174), "vit-b16": (86_567_656, 152),
    "bert-base": (109_482_240, 199), "gpt2": (124_439_808, 148),
}  # fmt: skip


def timing(seconds, rng, spread=0.02, temporaries=0):
    """Samples about a median."""
    return Timing([seconds * (1 + rng.gauss(0, spread)) for _ in range(21)], temporaries)


def result(name, family, times, rng, *, optimizer="Adam", dtype="float32", elements=64_000_000, arrays=1, **more):
    """A result whose contenders take the given seconds."""
    fields = {"threads": 2, "bytes": 28 * elements, **more}
    made = Result(name, family, optimizer, dtype, elements, arrays, **fields)
    eager = {"torch loop", "torch foreach", "numpy"}
    made.timings = {
        contender: timing(seconds, rng, temporaries=4 * elements if contender in eager else 0)
        for contender, seconds in times.items()
    }
    return made


def plausible():
    """Every family, all contenders, some losses."""
    rng = random.Random(0)
    results = [_adam(rng), *_models(rng), *_sizes(rng), *_arrays(rng)]
    for threads in (1, 2, 4, 8):
        limit = 0.3 / min(threads, 3 + threads / 8)
        times = {"fastopt": limit * 1.02, "torch fused": limit * 1.2, "stream": limit}
        results.append(result(f"adam-{threads}-threads", "threads", times, rng, threads=threads))
    results += [*_rules(rng), *_dtypes(rng)]
    for name, ours, theirs in (("clip", 0.04, 0.14), ("weight decay", 0.032, 0.039), ("zero", 0.036, 0.052)):
        times = {"fastopt": ours, "fastopt plain": 0.0315, "torch fused": theirs}
        results.append(result(f"adam-{name}", "options", times, rng))
    for name, scale in (("import", 1.0), ("first step", 0.02)):
        times = {"fastopt": 0.045 * scale, "torch fused": 1.1 * scale, "numba": 2.4 * scale, "numpy": 0.0009 * scale}
        results.append(result(name, "startup", times, rng, elements=0, arrays=0, optimizer=name))
    return Record(dict(MACHINE), "full", results, seconds=3723.0)


def _adam(rng):
    times = {"fastopt": 0.0315, "stream": 0.0312, "torch fused": 0.038, "torch loop": 0.2, "numpy": 0.41}
    found = result("adam", "bars", times, rng)
    found.verdicts = [
        Verdict("fastopt ≥ 0.93 of stream's speed", "fastopt", "stream", 1 / 0.93, 0.99, 0.98, 1.0, True),
        Verdict("fastopt ≤ 0.8 × torch fused", "fastopt", "torch fused", 0.8, 0.83, 0.81, 0.84, False),
        Verdict("fastopt ≤ 0.5 × optimi", "fastopt", "optimi", 0.5),
    ]
    return found


def _models(rng):
    factors = {
        "fastopt.torch": 1.0, "torch fused": 1.22, "torch foreach": 5.8, "torch loop": 5.1, "torch compile": 1.4,
        "optimi": 6.3,
    }  # fmt: skip
    found = []
    for model, (elements, arrays) in MODELS.items():
        step = elements * 28 / 57e9
        times = {name: factor * step * rng.uniform(0.95, 1.1) for name, factor in factors.items()}
        if model == "mobilenet-v3-large":
            times["torch compile"] = 0.9 * times["fastopt.torch"]
        shown = {"optimizer": "AdamW", "elements": elements, "arrays": arrays, "model": model}
        found.append(result(f"adamw-{model}", "models", times, rng, **shown))
    return found


def _sizes(rng):
    found = []
    for elements in (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 64_000_000):
        limit = 28 * elements / (120e9 if elements < 200_000 else 80e9 if elements < 2_000_000 else 57e9)
        times = {
            "fastopt": limit * 1.01 + 6e-6, "torch fused": limit * 1.2 + 2e-5, "torch foreach": limit * 6 + 6e-5,
            "torch loop": limit * 5 + 5e-5, "numba": limit * 1.1 + 3e-6, "numpy": limit * 12 + 1.2e-5,
            "stream": limit + 1e-6,
        }  # fmt: skip
        found.append(result(f"adam-{elements}", "sizes", times, rng, elements=elements))
    found[-2].timings["torch fused"] = timing(28e7 / 40e9, rng, spread=0.3)
    return found


def _arrays(rng):
    limit = 28 * (1 << 20) / 57e9
    for count in (1, 10, 100, 1000, 10000):
        times = {
            "fastopt": limit, "fastopt arrays": limit + 3e-7 * count, "fastopt.torch": limit * 1.05 + 6e-7 * count,
            "torch fused": limit * 1.2 + 8e-6 * count, "torch foreach": limit * 5 + 2.5e-5 * count,
            "torch loop": limit * 5 + 4e-5 * count,
        }  # fmt: skip
        yield result(f"adam-{count}-arrays", "arrays", times, rng, elements=1 << 20, arrays=count)


def _rules(rng):
    moved = {"SGD": 12, "Momentum": 20, "Adagrad": 20, "RMSprop": 20, "Adam": 28, "NAdam": 28, "Lion": 20, "LARS": 28}
    for optimizer, size in moved.items():
        limit = size * 64e6 / 57e9
        times = {"fastopt": limit * rng.uniform(1.0, 1.08), "stream": limit}
        if optimizer not in ("Lion", "LARS"):
            times |= {"torch foreach": limit * rng.uniform(3, 9), "torch loop": limit * rng.uniform(3, 8)}
        if optimizer in ("SGD", "Adam", "Adagrad"):
            times["torch fused"] = limit * 1.2
        made = result(f"rule-{optimizer.lower()}", "rules", times, rng, optimizer=optimizer, bytes=size * 64_000_000)
        if "torch loop" not in times:
            made.problems["torch foreach"] = f"has no {optimizer}"
        yield made


def _dtypes(rng):
    for dtype, size in {"float32": 28, "float64": 56, "float16": 22, "bfloat16": 22}.items():
        limit = size * 64e6 / 57e9
        times = {"fastopt": limit * 1.06, "stream": limit, "torch fused": limit * 1.3}
        made = result(f"adam-{dtype}", "dtypes", times, rng, dtype=dtype, bytes=size * 64_000_000)
        if dtype == "float16":
            del made.timings["torch fused"]
            made.problems["torch fused"] = "does not compute float16"
        yield made


def awkward():
    """Missing contenders, one round only, wrong answers, skipped cases, text that is no HTML."""
    rng = random.Random(1)
    one_round = result("adam", "sizes", {"fastopt": 0.03, "numpy": 0.02}, rng)
    one_round.timings = {name: Timing(found.samples[:1]) for name, found in one_round.timings.items()}
    one_round.problems = dict.fromkeys(("torch fused", "torch loop"), "not installed: pip install torch")
    one_round.problems |= {"numba": "wrong answer: w is off by 0.25", "stream": f"RuntimeError: {HOSTILE}"}
    one_round.verdicts = [Verdict("fastopt ≥ 0.93 of stream's speed", "fastopt", "stream", 1.08)]
    nothing = result("adam-1g", "sizes", {}, rng, elements=10**9)
    nothing.skipped = f"adam-1g needs about 96.0 GB for 3 contenders; 20.1 GB are free. {HOSTILE}"
    model = result("adamw-resnet50", "models", {"torch fused": 0.04}, rng, model=f"resnet50 {HOSTILE}")
    threads = result("adam-2-threads", "threads", {"fastopt": 0.03, "unheard of": 0.05}, rng, threads=2)
    no_stream = result("rule-adam", "rules", {"fastopt": 0.03}, rng)
    unpaired = result("adam-clip", "options", {"fastopt": 0.03, "torch fused": 0.02}, rng)
    unpaired.timings["torch fused"].samples.pop()
    empty = result("adam-empty", "of its own", {"fastopt": 0.03, "numpy": 0.2}, rng)
    empty.timings["numpy"] = Timing([])
    return Record({"processor": None}, "quick", [one_round, nothing, model, threads, no_stream, unpaired, empty])
