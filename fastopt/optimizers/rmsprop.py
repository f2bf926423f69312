"""RMSprop."""

from ..base import Optimizer
from ..kernels.registry import RULES


class RMSprop(Optimizer):
    r"""RMSprop: the gradient divided by the root of a running mean of its square.

    With d_t = g_t + weight_decay w_{t-1}::

        v_t = alpha v_{t-1} + (1 - alpha) d_t^2
        centered:  m_t = alpha m_{t-1} + (1 - alpha) d_t, and v_t - m_t^2 (not below 0) takes the place of v_t below
        plain:     w_t = w_{t-1} - lr d_t / (sqrt(v_t) + eps)
        momentum:  b_t = momentum b_{t-1} + d_t / (sqrt(v_t) + eps)
                   w_t = w_{t-1} - lr b_t

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        alpha: Decay rate of the running means, in [0, 1).
        eps: Added to the root, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: L2 penalty, >= 0; added to the gradient.
        momentum: Factor on the buffer, in [0, 1]; 0 means no buffer.
        centered: Divide by an estimate of the variance. torch lets rounding take it below zero and returns NaN.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        eps_inside_sqrt: Divide by sqrt(v_t + eps) instead, as TensorFlow does.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``square_avg``, with ``centered`` also ``grad_avg``, with momentum also ``momentum_buffer`` (float32; float64
    for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
        Graves, Generating Sequences With Recurrent Neural Networks, 2013, arXiv:1308.0850 (centered).

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.RMSprop([w], lr=0.05)
        >>> info = opt.step([np.array([4.0, 0.0])])  # sqrt(v) = 0.1 * 4
        >>> w.round(6).tolist()
        [0.5, -1.0]
    """

    rule = RULES["rmsprop"]
