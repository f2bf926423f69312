"""Rprop."""

from ..base import Optimizer
from ..kernels.registry import RULES


class Rprop(Optimizer):
    r"""Resilient backpropagation: step sizes grow while the gradient keeps its sign and shrink when it turns.

    For each element::

        g_t g_{t-1} > 0:  s_t = min(etas[1] s_{t-1}, step_sizes[1])
        g_t g_{t-1} < 0:  s_t = max(etas[0] s_{t-1}, step_sizes[0]), and g_t counts as 0 here and in the next step
        otherwise:        s_t = s_{t-1}
        w_t = w_{t-1} - sign(g_t) s_t

    A gradient that is NaN has no sign, as in torch: w and s stay. The next gradient counts as a first.

    It is meant for full batches: noise in the gradient's sign shrinks the steps.

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: First step size s_0, >= 0; read when the optimizer is made (torch: at the first step).
        etas: Factors on the step size when the sign turns, in (0, 1), and when it stays, > 1.
        step_sizes: Smallest and largest step size, > 0.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``prev`` (the last gradient), ``step_size`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Riedmiller and Braun, A direct adaptive method for faster backpropagation learning: the RPROP algorithm, 1993.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.Rprop([w], lr=0.1)
        >>> for _ in range(2):
        ...     info = opt.step([np.array([4.0, -0.001])])
        >>> w.round(6).tolist()  # 0.1, then 0.12
        [0.78, -0.78]
    """

    rule = RULES["rprop"]
