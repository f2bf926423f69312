"""RAdam."""

from ..base import Optimizer
from ..kernels.registry import RULES


class RAdam(Optimizer):
    r"""RAdam: Adam whose first steps, while the second moment is not yet reliable, are plain momentum steps.

    With d_t = g_t + weight_decay w_{t-1} (decoupled: d_t = g_t, and w_{t-1} is first multiplied by 1 - lr
    weight_decay)::

        m_t = beta1 m_{t-1} + (1 - beta1) d_t
        v_t = beta2 v_{t-1} + (1 - beta2) d_t^2
        rho_inf = 2 / (1 - beta2) - 1,  rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
        rho_t > 5:  r_t = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
                    w_t = w_{t-1} - lr r_t m_t / (1 - beta1^t) sqrt(1 - beta2^t) / (sqrt(v_t) + eps)
        otherwise:  w_t = w_{t-1} - lr m_t / (1 - beta1^t)

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: L2 penalty, >= 0; added to the gradient, or a decay rate multiplied by lr where decoupled.
        decoupled_weight_decay: Decay as AdamW does.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``exp_avg``, ``exp_avg_sq`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020, arXiv:1908.03265, Algorithm 2.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.RAdam([w], lr=0.1)
        >>> info = opt.step([np.array([4.0, 0.0])])
        >>> w.round(6).tolist()
        [0.6, -1.0]
    """

    rule = RULES["radam"]
