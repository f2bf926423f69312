"""optax under ``jax.jit`` on the CPU, with donated parameters and states."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np

from ..case import Case
from .base import Arrays, betas_of
from .limited import Limited


class Optax(Limited):
    """``optax.apply_updates(params, optimizer.update(grads, state, params))``, compiled as one function.

    Left out are those that compute something else than torch: Adagrad has eps inside the root, NAdam no schedule of the
    momentum, Rprop another rule where the sign turns; RAdam has eps next to the root of the corrected second moment,
    torch's next to that of the other.
    """

    package = "optax"
    install = "pip install optax"  # brings jax for the CPU
    known: ClassVar[dict[str, tuple[str, ...]]] = {
        "SGD": ("lr", "momentum", "nesterov", "weight_decay"),
        "RMSprop": ("lr", "alpha", "eps", "weight_decay"),
        "Adam": ("lr", "betas", "eps", "weight_decay"),
        "AdamW": ("lr", "betas", "eps", "weight_decay"),
        "Adadelta": ("lr", "rho", "eps"),
        "Adamax": ("lr", "betas", "eps", "weight_decay"),
        "Lion": ("lr", "betas", "weight_decay"),
    }

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        # The size of the thread pool of XLA's CPU client, which reads it when JAX starts it in this process.
        # --xla_cpu_multi_thread_eigen is for matrix products and the like, and binding the process to some processors
        # would choose for the system which; neither is needed.
        os.environ["PJRT_NPROC"] = str(threads)
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax
        import optax

        optimizer = transformation(case)

        def update(params: Any, grads: Any, state: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        # Copies: JAX may share the memory of NumPy's arrays, and what is shared cannot be donated.
        device = jax.devices("cpu")[0]
        self.params, self.grads = (jax.device_put(arrays, device, may_alias=False) for arrays in (params, grads))
        self.state = jax.jit(optimizer.init)(self.params)
        self.update = jax.jit(update, donate_argnums=(0, 2))
        self.wait = jax.block_until_ready

    def step(self) -> None:  # noqa: D102
        self.params, self.state = self.wait(self.update(self.params, self.grads, self.state))

    def parameter(self, name: str) -> Any:  # noqa: D102
        return np.asarray(self.params[name])

    def scale_gradients(self, factor: float) -> None:  # noqa: D102
        self.grads = self.wait({name: array * np.float32(factor) for name, array in self.grads.items()})


def transformation(case: Case) -> Any:
    """optax's optimizer with torch's options and defaults."""
    import optax

    hyper = case.hyper
    name, lr, eps = case.optimizer, hyper["lr"], hyper.get("eps", 1e-8)
    beta1, beta2 = betas_of(hyper)
    if name == "AdamW":
        return optax.adamw(lr, beta1, beta2, eps, weight_decay=hyper.get("weight_decay", 1e-2))
    if name == "Lion":
        beta1, beta2 = hyper.get("betas", (0.9, 0.99))
        return optax.lion(lr, beta1, beta2, weight_decay=hyper.get("weight_decay", 0.0))
    if name == "SGD":
        made = optax.sgd(lr, hyper.get("momentum") or None, hyper.get("nesterov", False))
    elif name == "RMSprop":
        made = optax.rmsprop(lr, hyper.get("alpha", 0.99), eps, eps_in_sqrt=False)
    elif name == "Adadelta":
        made = optax.adadelta(lr, hyper.get("rho", 0.9), hyper.get("eps", 1e-6))
    else:
        made = {"Adam": optax.adam, "Adamax": optax.adamax}[name](lr, beta1, beta2, eps)
    decay = hyper.get("weight_decay", 0.0)
    return optax.chain(optax.add_decayed_weights(decay), made) if decay else made
