# Written by tests/support/stubs.py from the rules' records, for type checkers and editors.

from ..base import Optimizer, Params

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
]

class ASGD(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class LAMB(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-06,
        weight_decay: float = 0.0,
        *,
        adapt: bool | None = None,
        decay_1d: bool | None = None,
        trust_clip: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class LARS(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        clip: bool = False,
        adapt: bool | None = None,
        decay_1d: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        keep_weight_norms: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...
    def weights_written(self) -> None: ...

class SGD(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.001,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        lr_in_momentum: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class Adadelta(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class Adagrad(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        eps_inside_sqrt: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class Adam(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        eps_hat: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class AdamW(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        eps_hat: bool = False,
        fully_decoupled: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class Adamax(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class Lion(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class NAdam(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class RAdam(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class RMSprop(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        eps_inside_sqrt: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...

class Rprop(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50.0),
        *,
        maximize: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None: ...
