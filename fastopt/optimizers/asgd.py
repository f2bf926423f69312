"""Averaged SGD."""

from ..base import Optimizer
from ..kernels.registry import RULES


class ASGD(Optimizer):
    r"""Averaged stochastic gradient descent: SGD with a falling rate, and the mean of the parameters beside it.

    With d_t = g_t + weight_decay w_{t-1}, eta_1 = lr and mu_1 = 1::

        w_t = (1 - lambd eta_t) w_{t-1} - eta_t d_t
        a_t = mu_t w_t + (1 - mu_t) a_{t-1}
        eta_{t+1} = lr / (1 + lambd lr t)^alpha,  mu_{t+1} = 1 / max(1, t - t0)

    As in torch, a step prepares eta for the next one, so a change of lr acts one step late.

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        lambd: Decay of the parameters, >= 0.
        alpha: Power of the fall of eta, >= 0.
        t0: Step at which averaging begins, >= 0; a_t is w_t until then.
        weight_decay: L2 penalty, >= 0; added to the gradient.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``ax`` (a_t; float32; float64 for float64 parameters) and the numbers ``eta`` and ``mu`` of the next step.
    The averaged parameters are ``opt.state[name]["ax"]``.

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 30, 1992.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0])
        >>> opt = fastopt.ASGD([w], lr=0.5, lambd=0.0, t0=0)
        >>> for _ in range(3):
        ...     info = opt.step([np.array([1.0])])
        >>> w.tolist(), opt.state["0"]["ax"].tolist()
        ([-0.5], [-0.25])
    """

    rule = RULES["asgd"]
