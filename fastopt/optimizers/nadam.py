"""NAdam."""

from ..base import Optimizer
from ..kernels.registry import RULES


class NAdam(Optimizer):
    r"""NAdam: Adam with Nesterov momentum and a momentum that warms up.

    With d_t = g_t + weight_decay w_{t-1} (decoupled: d_t = g_t, and w_{t-1} is first multiplied by 1 - lr
    weight_decay)::

        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),  M_t = mu_1 mu_2 ... mu_t
        m_t = beta1 m_{t-1} + (1 - beta1) d_t
        v_t = beta2 v_{t-1} + (1 - beta2) d_t^2
        w_t = w_{t-1} - lr ((1 - mu_t) / (1 - M_t) d_t + mu_{t+1} / (1 - M_{t+1}) m_t)
                        / (sqrt(v_t) / sqrt(1 - beta2^t) + eps)

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: L2 penalty, >= 0; added to the gradient, or a decay rate multiplied by lr where decoupled.
        momentum_decay: How fast mu_t rises to beta1, >= 0.
        decoupled_weight_decay: Decay as AdamW does.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``exp_avg``, ``exp_avg_sq`` (float32; float64 for float64 parameters) and the number ``mu_product`` (M_t).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop, 2016.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.NAdam([w], lr=0.1)
        >>> info = opt.step([np.array([4.0, 0.0])])
        >>> w.round(3).tolist(), round(opt.state["0"]["mu_product"], 4)
        ([0.894, -1.0], 0.4501)
    """

    rule = RULES["nadam"]
