"""Adamax."""

from ..base import Optimizer
from ..kernels.registry import RULES


class Adamax(Optimizer):
    r"""Adamax: Adam with the infinity norm of past gradients.

    With d_t = g_t + weight_decay w_{t-1}::

        m_t = beta1 m_{t-1} + (1 - beta1) d_t
        u_t = max(beta2 u_{t-1}, |d_t| + eps)
        w_t = w_{t-1} - lr / (1 - beta1^t) m_t / u_t

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        betas: Decay rates of mean and norm, each in [0, 1).
        eps: Added to the gradient's size (the paper has none), >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: L2 penalty, >= 0; added to the gradient.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``exp_avg`` (m), ``exp_inf`` (u) (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv:1412.6980, Algorithm 2.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.Adamax([w], lr=0.1)
        >>> info = opt.step([np.array([4.0, 0.0])])
        >>> w.round(6).tolist()
        [0.9, -1.0]
    """

    rule = RULES["adamax"]
