"""LAMB: layer-wise adaptive moments."""

from ..base import Optimizer
from ..kernels.registry import RULES


class LAMB(Optimizer):
    r"""Adam's direction with decoupled decay, scaled layer by layer, for large batches.

    For each array (a "layer"), with Euclidean norms over that array::

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        u_t = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps) + weight_decay w_{t-1}
        r_t = ||w_{t-1}|| / ||u_t||,  1 where a norm is 0
        w_t = w_{t-1} - lr min(r_t, trust_clip) u_t

    An array is one layer, also a stack of experts, say: pass views of its parts where each should have a ratio.

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        betas: Decay rates of both averages, each in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Decay rate, >= 0; a part of u, and so of its norm.
        adapt: Which arrays of a group have a ratio. None: those of two or more dimensions. True: all. False: none.
        decay_1d: Whether arrays of fewer than two dimensions (norm layers, biases) decay. None: where ``adapt`` is
            given.
        trust_clip: The largest ratio, > 0; None: no limit. timm takes 1.
        maximize: Ascend: the gradient is negated.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``. u is formed of the clipped
            gradients.

    State: ``exp_avg`` and ``exp_avg_sq`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020, arXiv:1904.00962,
        Algorithm 2. docs/design.md tells how implementations differ.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.full((2, 2), 2.0)  # ||w|| = 4; all of u is 1 in the first step, so ||u|| = 2
        >>> opt = fastopt.LAMB([w], lr=0.1, eps=0.0)
        >>> info = opt.step([np.full((2, 2), 5.0)])
        >>> w.round(3).tolist()
        [[1.8, 1.8], [1.8, 1.8]]
    """

    rule = RULES["lamb"]
