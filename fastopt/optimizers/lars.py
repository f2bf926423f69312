"""LARS: layer-wise adaptive rate scaling."""

from typing import Any

from ..base import Optimizer
from ..kernels.registry import RULES


class LARS(Optimizer):
    r"""Momentum whose learning rate is scaled layer by layer, for large batches (MLPerf's form).

    For each array (a "layer"), with Euclidean norms over that array::

        r_t = trust_coefficient ||w_{t-1}|| / (||g_t|| + weight_decay ||w_{t-1}|| + eps),  1 where a norm is 0
        b_t = momentum b_{t-1} + lr r_t (g_t + weight_decay w_{t-1})
        w_t = w_{t-1} - b_t
        Nesterov: w_t = w_{t-1} - (momentum b_t + lr r_t (g_t + weight_decay w_{t-1}))

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0. It is large compared with SGD's: r_t is about trust_coefficient.
        momentum: Factor on the buffer, in [0, 1].
        weight_decay: L2 penalty, >= 0; added to the gradient and to the ratio's denominator.
        trust_coefficient: The eta of the paper, >= 0.
        eps: Added to the ratio's denominator, >= 0.
        nesterov: Use Nesterov's momentum; needs momentum > 0.
        lr_in_momentum: Keep lr inside the buffer (the paper, MLPerf). False is torch's way, b_t without lr and
            w_t = w_{t-1} - lr b_t, as in Apex LARC and timm. The two differ when lr changes.
        clip: LARC: take min(r_t / lr, 1) for r_t, so that lr r_t never exceeds lr.
        adapt: Which arrays of a group have a ratio; the others take plain momentum steps. None: those of two or more
            dimensions, as in MLPerf. True: all. False: none.
        decay_1d: Whether arrays of fewer than two dimensions (norm layers, biases) decay. None: where ``adapt`` is
            given; **they do not by default**, as in MLPerf.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        keep_weight_norms: Promise that only this optimizer writes the parameters between steps. Their norms, taken as
            an update writes them, then serve the next step, which need not read them once more: faster, and the same
            bits. After writing parameters all the same call ``weights_written()``, or the next step takes its ratios
            from the old weights. On a GPU they are always taken anew.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``momentum_buffer`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, 2017, arXiv:1708.03888.
        docs/design.md tells how implementations of LARS differ.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.full((2, 2), 2.0)  # ||w|| = 4
        >>> opt = fastopt.LARS([w], lr=1.0, momentum=0.9, trust_coefficient=0.01)
        >>> info = opt.step([np.full((2, 2), 100.0)])  # ||g|| = 200: the ratio is 0.01 * 4 / 200
        >>> w.round(3).tolist()
        [[1.98, 1.98], [1.98, 1.98]]
    """

    rule = RULES["lars"]
    flags = ("keep_weight_norms",)

    def weights_written(self) -> None:
        """Another name of ``refresh``."""
        self.refresh()

    def _keeps(self, options: list[dict[str, Any]]) -> bool:
        return all(o["keep_weight_norms"] for o in options)
