"""Adadelta."""

from ..base import Optimizer
from ..kernels.registry import RULES


class Adadelta(Optimizer):
    r"""Adadelta: steps in the units of the parameters, from running means of squared gradients and squared steps.

    With d_t = g_t + weight_decay w_{t-1}::

        v_t = rho v_{t-1} + (1 - rho) d_t^2
        x_t = sqrt(u_{t-1} + eps) / sqrt(v_t + eps) d_t
        u_t = rho u_{t-1} + (1 - rho) x_t^2
        w_t = w_{t-1} - lr x_t

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        rho: Decay rate of both means, in [0, 1).
        eps: Added under both roots, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: L2 penalty, >= 0; added to the gradient.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``square_avg`` (v), ``acc_delta`` (u) (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012, arXiv:1212.5701, Algorithm 1 (which has lr = 1).

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.Adadelta([w], rho=0.75, eps=0.25)
        >>> info = opt.step([np.array([1.0, 0.0])])  # the step is sqrt(0.25) / sqrt(0.25 + 0.25)
        >>> w.round(4).tolist()
        [0.2929, -1.0]
    """

    rule = RULES["adadelta"]
