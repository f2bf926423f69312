"""What tests of checkpoints share."""

import numpy as np

import fastopt

SHAPES = {"w": (3, 5), "scalar": (), "empty": (0, 4), "b": (7,)}
OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "SGD without state": {"lr": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"betas": (0.8, 0.95)},
    "NAdam": {},
    "ASGD": {"t0": 2.0},
    "LARS": {"lr": 0.1, "keep_weight_norms": True},
}


def make_arrays(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def make_optimizer(name, params):
    return getattr(fastopt, name.split()[0])(params, **OPTIMIZERS[name])


def take_steps(opt, params, seeds):
    for seed in seeds:
        opt.step(make_arrays(params["w"].dtype, seed))


def contents(params, opt=None):
    """Every bit of parameters and optimizer, comparable with ==."""

    def plain(value):
        if isinstance(value, np.ndarray):
            return value.dtype.name, value.shape, value.tobytes()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else (type(value).__name__, repr(value))

    return plain(dict(params)), opt and plain(opt.state_dict())
