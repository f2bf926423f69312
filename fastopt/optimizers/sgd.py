"""Stochastic gradient descent."""

from ..base import Optimizer
from ..kernels.registry import RULES


class SGD(Optimizer):
    r"""Stochastic gradient descent, plain, with momentum or with Nesterov's momentum.

    With d_t = g_t + weight_decay w_{t-1}::

        plain:     w_t = w_{t-1} - lr d_t
        momentum:  b_t = momentum b_{t-1} + (1 - dampening) d_t,  b_1 = d_1
                   w_t = w_{t-1} - lr b_t
        Nesterov:  w_t = w_{t-1} - lr (d_t + momentum b_t)

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        momentum: Factor on the buffer, in [0, 1]. 0 is plain SGD, which has no buffer.
        dampening: Part of the gradient kept out of the buffer from a parameter's second step on, in [0, 1].
            ``1 - momentum`` makes the buffer an exponential moving average. (Where momentum is switched on later,
            torch leaves the first gradient after that undamped; here only the very first is.)
        weight_decay: L2 penalty, >= 0; added to the gradient.
        nesterov: Use Nesterov's momentum; needs momentum > 0 and dampening 0.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        lr_in_momentum: Keep lr inside the buffer, b_t = momentum b_{t-1} + lr d_t and w_t = w_{t-1} - b_t, as papers,
            TensorFlow and MLPerf do. The two differ when lr changes.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``momentum_buffer`` (float32; float64 for float64 parameters), unless momentum is 0.

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
        Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.SGD([w], lr=0.1, momentum=0.9)
        >>> for _ in range(2):
        ...     info = opt.step([np.array([1.0, 0.0])])
        >>> w.round(3).tolist()
        [0.71, -1.0]
    """

    rule = RULES["sgd"]
