"""Float64 NumPy references, one plain function per optimizer, written from the papers and torch.optim's documentation.

Nothing here is shared with the package. Every function takes the parameter `p`, its gradient `g`, the `state` before
the step and the number `t` of the step (the first is 1), and returns the new parameter and the new state; what it is
given stays unchanged. A state has torch's names, without `step`; `initial_state` makes the one before step 1.
`maximize` turns the sign of the gradient before weight decay. Arrays without dimensions come back as NumPy scalars.
"""

# One argument to a line would push the formulas apart.
# fmt: off

import math

import numpy as np


def initial_state(name, p, **hyper):
    """The state of the class `name` before its first step on `p`; `hyper` are its options, with the lr of that step."""
    momentum = ["momentum_buffer"] * (hyper.get("momentum", 0.0) != 0)
    moments, maximum = ["exp_avg", "exp_avg_sq"], ["max_exp_avg_sq"] * hyper.get("amsgrad", False)
    names = {
        "SGD": momentum, "Adagrad": ["sum"], "Adadelta": ["square_avg", "acc_delta"], "Adamax": ["exp_avg", "exp_inf"],
        "RMSprop": ["square_avg"] + ["grad_avg"] * hyper.get("centered", False) + momentum,
        "Adam": moments + maximum, "AdamW": moments + maximum, "NAdam": moments, "RAdam": moments, "LAMB": moments,
        "Rprop": ["prev", "step_size"], "ASGD": ["ax"], "Lion": ["exp_avg"], "LARS": ["momentum_buffer"],
    }[name]
    first = {"sum": hyper.get("initial_accumulator_value", 0.0), "step_size": hyper.get("lr", 1e-2)}
    floats = {"NAdam": {"mu_product": 1.0}, "ASGD": {"eta": hyper.get("lr", 1e-2), "mu": 1.0}}
    return {key: np.full(p.shape, first.get(key, 0.0)) for key in names} | floats.get(name, {})


def sgd(
    p, g, state, t, *, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False,
    lr_in_momentum=False
):
    """Gradient descent (Robbins, Monro 1951), momentum (Polyak 1964), Nesterov's as in Sutskever et al. 2013.

    d = g + wd p;  v = mu v + (1 - dampening) d, at the first step v = d;  p -= lr v, or for Nesterov lr (d + mu v).
    lr_in_momentum, as those papers have it: the same with lr d in the place of d, and p -= v.
    """
    d = (-g if maximize else g) + weight_decay * p
    if momentum == 0:
        return p - lr * d, {}
    d = lr * d if lr_in_momentum else d
    v = d.copy() if t == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * d
    u = d + momentum * v if nesterov else v
    return p - (u if lr_in_momentum else lr * u), {"momentum_buffer": v}


def adagrad(
    p, g, state, t, *, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10,
    maximize=False, eps_inside_sqrt=False
):
    """Duchi, Hazan, Singer 2011, diagonal form. `initial_accumulator_value` acts through `initial_state` alone."""
    d = (-g if maximize else g) + weight_decay * p
    s = state["sum"] + d**2
    root = np.sqrt(s + eps) if eps_inside_sqrt else np.sqrt(s) + eps
    return p - lr / (1 + (t - 1) * lr_decay) * d / root, {"sum": s}


def rmsprop(
    p, g, state, t, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, maximize=False,
    eps_inside_sqrt=False
):
    """Tieleman, Hinton 2012 (lecture 6.5); centered, and with momentum: Graves 2013 (arXiv:1308.0850).

    The variance of the centered form is never negative, but may round below zero: it is cut off there, and NaN stays.
    """
    d = (-g if maximize else g) + weight_decay * p
    square_avg = alpha * state["square_avg"] + (1 - alpha) * d**2
    new = {"square_avg": square_avg}
    variance = square_avg
    if centered:
        grad_avg = new["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * d
        variance = np.maximum(square_avg - grad_avg**2, 0)  # np.maximum keeps NaN
    u = d / (np.sqrt(variance + eps) if eps_inside_sqrt else np.sqrt(variance) + eps)
    if momentum != 0:
        u = new["momentum_buffer"] = momentum * state["momentum_buffer"] + u
    return p - lr * u, new


def _adam_moments(d, state, t, betas, eps, amsgrad, eps_hat):
    """The direction, m over the root of v, that Adam and AdamW have in common, and the new state."""
    beta1, beta2 = betas
    m = beta1 * state["exp_avg"] + (1 - beta1) * d
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = new["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    if eps_hat:
        return math.sqrt(correction2) / correction1 * m / (np.sqrt(v) + eps), new
    return (m / correction1) / (np.sqrt(v / correction2) + eps), new


def adam(
    p, g, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
    eps_hat=False
):
    """Kingma, Ba 2015 (arXiv:1412.6980), Algorithm 1; `eps_hat`: the form at the end of its section 2.

    AMSGrad: Reddi, Kale, Kumar 2018, the maximum being that of v before its correction, as in torch.
    """
    d = (-g if maximize else g) + weight_decay * p
    u, new = _adam_moments(d, state, t, betas, eps, amsgrad, eps_hat)
    return p - lr * u, new


def adamw(
    p, g, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False,
    eps_hat=False, fully_decoupled=False, initial_lr=None
):
    """Loshchilov, Hutter 2019 (arXiv:1711.05101), Algorithm 2: p is multiplied by 1 - lr wd before Adam's step.

    fully_decoupled, the paper's own: by 1 - wd lr / initial_lr; without `initial_lr` the schedule is at its start.
    """
    schedule = 1.0 if initial_lr is None else lr / initial_lr
    decay = 1 - weight_decay * (schedule if fully_decoupled else lr)
    u, new = _adam_moments(-g if maximize else g, state, t, betas, eps, amsgrad, eps_hat)
    return decay * p - lr * u, new


def adadelta(p, g, state, t, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False):
    """Zeiler 2012 (arXiv:1212.5701), Algorithm 1, where lr is 1."""
    d = (-g if maximize else g) + weight_decay * p
    square_avg = rho * state["square_avg"] + (1 - rho) * d**2
    delta = np.sqrt(state["acc_delta"] + eps) / np.sqrt(square_avg + eps) * d
    acc_delta = rho * state["acc_delta"] + (1 - rho) * delta**2
    return p - lr * delta, {"square_avg": square_avg, "acc_delta": acc_delta}


def adamax(p, g, state, t, *, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False):
    """Kingma, Ba 2015 (arXiv:1412.6980), Algorithm 2; torch adds eps to the magnitude of the gradient."""
    beta1, beta2 = betas
    d = (-g if maximize else g) + weight_decay * p
    m = beta1 * state["exp_avg"] + (1 - beta1) * d
    u = np.maximum(beta2 * state["exp_inf"], np.abs(d) + eps)
    return p - lr / (1 - beta1**t) * m / u, {"exp_avg": m, "exp_inf": u}


def _decayed(p, d, decoupled, weight_decay):
    return (p, d + weight_decay * p) if decoupled is None else ((1 - decoupled) * p, d)


def nadam(
    p, g, state, t, *, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3,
    decoupled_weight_decay=False, maximize=False
):
    """Dozat 2016, with the momentum schedule proposed there; `mu_product` is the product of all mu so far."""
    beta1, beta2 = betas
    p, d = _decayed(p, -g if maximize else g, lr * weight_decay if decoupled_weight_decay else None, weight_decay)
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    mu_product = state["mu_product"] * mu
    m = beta1 * state["exp_avg"] + (1 - beta1) * d
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2
    m_hat = mu_next * m / (1 - mu_product * mu_next) + (1 - mu) * d / (1 - mu_product)
    v_hat = v / (1 - beta2**t)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), {"exp_avg": m, "exp_avg_sq": v, "mu_product": mu_product}


def radam(
    p, g, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False,
    maximize=False
):
    """Liu et al. 2020 (arXiv:1908.03265), Algorithm 2; torch rectifies for rho > 5 (there 4), with eps at sqrt(v)."""
    beta1, beta2 = betas
    p, d = _decayed(p, -g if maximize else g, lr * weight_decay if decoupled_weight_decay else None, weight_decay)
    m = beta1 * state["exp_avg"] + (1 - beta1) * d
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2
    u = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        u = r * u * math.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
    return p - lr * u, {"exp_avg": m, "exp_avg_sq": v}


def rprop(p, g, state, t, *, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0), maximize=False):
    """Riedmiller, Braun 1993 as torch has it, which is iRprop- of Igel, Huesken 2000.

    Where the sign of the gradient turned, p waits for one step and the next one counts as a first. `lr` is the first
    step size, and acts through `initial_state` alone. The sign of NaN is 0, as in torch: p stays.
    """
    d = -g if maximize else g
    agree = np.sign(d) * np.sign(state["prev"])  # not d * prev, which may underflow
    factor = np.where(agree > 0, etas[1], np.where(agree < 0, etas[0], 1.0))
    step_size = np.clip(factor * state["step_size"], *step_sizes)
    d = np.where(agree < 0, 0.0, d)
    return p - np.nan_to_num(np.sign(d)) * step_size, {"prev": d, "step_size": step_size}


def asgd(p, g, state, t, *, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0, maximize=False):
    """Polyak, Juditsky 1992 as torch has it (schedule of Bottou's sgd): `ax` is the average of p from step t0 on.

    `eta` and `mu` of the state serve this step; those for the next are made at its end, so a new lr acts a step late.
    """
    d = (-g if maximize else g) + weight_decay * p
    eta, mu = state["eta"], state["mu"]
    p = (1 - lambd * eta) * p - eta * d
    ax = p.copy() if mu == 1 else state["ax"] + mu * (p - state["ax"])
    return p, {"ax": ax, "eta": lr / (1 + lambd * lr * t) ** alpha, "mu": 1 / max(1.0, t - t0)}


def lion(p, g, state, t, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Chen et al. 2023 (arXiv:2302.06675), Algorithm 2; sign(0) = 0, and the sign of NaN is NaN."""
    beta1, beta2 = betas
    d = -g if maximize else g
    u = np.sign(beta1 * state["exp_avg"] + (1 - beta1) * d)
    return p - lr * (u + weight_decay * p), {"exp_avg": beta2 * state["exp_avg"] + (1 - beta2) * d}


def lars(
    p, g, state, t, *, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=0.0, nesterov=False,
    lr_in_momentum=True, clip=False, adapt=None, decay_1d=None, maximize=False, keep_weight_norms=False
):
    """You, Gitman, Ginsburg 2017 (arXiv:1708.03888), Algorithm 1, in the form of MLPerf.

    ratio = trust_coefficient |p| / (|g| + wd |p| + eps);  v = mu v + lr ratio (g + wd p);  p -= v.
    The ratio is 1 where |p| or |g| is 0, and without `adapt`. Where there is a ratio, `clip` (LARC) makes lr ratio the
    smaller of it and lr. `keep_weight_norms` says where |p| comes from and so changes nothing here.
    """
    d = -g if maximize else g
    adapt, weight_decay = _layer(p, adapt, decay_1d, weight_decay)
    norm_p, norm_d = math.sqrt(np.sum(p**2)), math.sqrt(np.sum(d**2))
    ratio = 1.0
    if adapt and norm_p != 0 and norm_d != 0:
        ratio = trust_coefficient * norm_p / (norm_d + weight_decay * norm_p + eps)
        if clip:  # min(ratio / lr, 1), also for lr = 0
            ratio = 1.0 if ratio >= lr else ratio / lr
    d = (lr * ratio if lr_in_momentum else ratio) * (d + weight_decay * p)
    v = momentum * state["momentum_buffer"] + d
    u = d + momentum * v if nesterov else v
    return p - (u if lr_in_momentum else lr * u), {"momentum_buffer": v}


def lamb(
    p, g, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, adapt=None, decay_1d=None,
    trust_clip=None, maximize=False
):
    """You et al. 2020 (arXiv:1904.00962), Algorithm 2, phi being the identity."""
    adapt, weight_decay = _layer(p, adapt, decay_1d, weight_decay)
    u, new = _adam_moments(-g if maximize else g, state, t, betas, eps, False, False)
    u = u + weight_decay * p
    norm_p, norm_u = math.sqrt(np.sum(p**2)), math.sqrt(np.sum(u**2))
    ratio = norm_p / norm_u if norm_p != 0 and norm_u != 0 else 1.0
    ratio = ratio if trust_clip is None else min(ratio, trust_clip)
    return p - lr * (ratio if adapt else 1.0) * u, new


def _layer(p, adapt, decay_1d, weight_decay):
    """Whether an array has a ratio, and its decay. By default those of one dimension or none have neither."""
    decay_1d = adapt is not None if decay_1d is None else decay_1d
    return p.ndim > 1 if adapt is None else adapt, weight_decay if p.ndim > 1 or decay_1d else 0.0


def global_norm(grads):
    """The Euclidean norm of all gradients together; None counts for nothing."""
    return math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads if g is not None))


def clip_coefficient(norm, max_norm):
    """What the gradients are multiplied by: min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_; NaN stays."""
    return float(np.minimum(1.0, max_norm / (norm + 1e-6)))


REFERENCES = {
    "SGD": sgd, "Adagrad": adagrad, "RMSprop": rmsprop, "Adam": adam, "AdamW": adamw, "Adadelta": adadelta,
    "Adamax": adamax, "NAdam": nadam, "RAdam": radam, "Rprop": rprop, "ASGD": asgd, "Lion": lion, "LARS": lars,
    "LAMB": lamb,
}
