"""AdaGrad."""

from ..base import Optimizer
from ..kernels.registry import RULES


class Adagrad(Optimizer):
    r"""AdaGrad: every element's learning rate falls with its accumulated squared gradients.

    With d_t = g_t + weight_decay w_{t-1}::

        s_t = s_{t-1} + d_t^2,  s_0 = initial_accumulator_value
        w_t = w_{t-1} - lr / (1 + (t - 1) lr_decay) d_t / (sqrt(s_t) + eps)

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        lr_decay: Fall of the learning rate with the number of steps, >= 0.
        weight_decay: L2 penalty, >= 0; added to the gradient.
        initial_accumulator_value: Start of the accumulator, >= 0.
        eps: Added to the root, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        eps_inside_sqrt: Divide by sqrt(s_t + eps) instead, as TensorFlow, Keras and optax do (their eps is 1e-7 and
            their accumulator starts at 0.1).
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``sum`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Duchi, Hazan and Singer, Adaptive Subgradient Methods, JMLR 12, 2011.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.Adagrad([w], lr=0.1)
        >>> info = opt.step([np.array([4.0, -0.5])])
        >>> w.round(6).tolist()
        [0.9, -0.9]
    """

    rule = RULES["adagrad"]
