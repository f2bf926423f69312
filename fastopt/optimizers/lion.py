"""Lion."""

from ..base import Optimizer
from ..kernels.registry import RULES


class Lion(Optimizer):
    r"""Lion: every element moves by lr in the direction of the sign of an interpolated momentum::

        u_t = sign(beta1 m_{t-1} + (1 - beta1) g_t),  sign(0) = 0
        w_t = w_{t-1} - lr (u_t + weight_decay w_{t-1})
        m_t = beta2 m_{t-1} + (1 - beta2) g_t

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0; three to ten times smaller than Adam's.
        betas: Weight of the momentum in the step, and its decay rate, each in [0, 1).
        weight_decay: Decoupled decay rate, >= 0, multiplied by lr; three to ten times larger than AdamW's.
        maximize: Ascend: the gradient is negated.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``exp_avg`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv:2302.06675, Algorithm 2.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0, 0.5])
        >>> opt = fastopt.Lion([w], lr=0.1)
        >>> info = opt.step([np.array([4.0, -0.001, 0.0])])
        >>> w.round(6).tolist()
        [0.9, -0.9, 0.5]
    """

    rule = RULES["lion"]
