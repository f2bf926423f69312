"""Adam, AdamW and their AMSGrad variants."""

from typing import Any

from ..base import Optimizer
from ..kernels.registry import RULES


class Adam(Optimizer):
    r"""Adam; with ``amsgrad`` its variant that never forgets the largest second moment.

    With d_t = g_t + weight_decay w_{t-1}::

        m_t = beta1 m_{t-1} + (1 - beta1) d_t
        v_t = beta2 v_{t-1} + (1 - beta2) d_t^2
        w_t = w_{t-1} - lr / (1 - beta1^t) m_t / (sqrt(v_t) / sqrt(1 - beta2^t) + eps)

    AMSGrad puts the maximum of v_1 ... v_t in the place of v_t in the last line.

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: L2 penalty, >= 0; added to the gradient. ``AdamW`` decouples it.
        amsgrad: Use AMSGrad.
        maximize: Ascend: the gradient is negated before the decay.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        eps_hat: Add eps before the second moment's correction, as the paper's second form, TensorFlow and Keras do:
            lr sqrt(1 - beta2^t) / (1 - beta1^t) m_t / (sqrt(v_t) + eps).
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``exp_avg``, ``exp_avg_sq`` and with AMSGrad ``max_exp_avg_sq`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``.

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv:1412.6980, Algorithm 1.
        Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, ICLR 2018, arXiv:1904.09237. As in torch, the
        maximum is taken of v_t without its correction.

    Example:
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, -1.0])
        >>> opt = fastopt.Adam({"w": w}, lr=0.1)
        >>> info = opt.step({"w": np.array([0.5, 0.0])})
        >>> w.round(6).tolist(), opt.state["w"]["step"]
        ([0.9, -1.0], 1)
    """

    rule = RULES["adam"]


class AdamW(Optimizer):
    r"""Adam with decoupled weight decay::

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        w_t = (1 - lr weight_decay) w_{t-1} - lr / (1 - beta1^t) m_t / (sqrt(v_t) / sqrt(1 - beta2^t) + eps)

    Args:
        params: As for ``fastopt.Optimizer``: arrays of any shape; float32, float64, float16 or bfloat16.
        lr: Learning rate, >= 0.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, >= 0, and not so small that it rounds to zero in float32
            (float64 for float64 parameters). With 0 an element that had no gradient yet becomes 0 / 0, as in torch.
        weight_decay: Decay rate, >= 0, multiplied by lr as in torch.
        amsgrad: Use AMSGrad, as in ``Adam``.
        maximize: Ascend: the gradient is negated.
        capturable: The step can be captured into a CUDA graph, see ``fastopt.Optimizer``.
        eps_hat: Add eps before the second moment's correction, as in ``Adam``.
        fully_decoupled: Multiply the decay by the schedule only, as the paper does: by lr / initial_lr, where
            initial_lr is the group's lr at the start. Choose weight_decay about lr times smaller then.
        ema_decay, ema_warmup: Average the parameters, see ``fastopt.Optimizer``.
        max_grad_norm, skip_nonfinite, zero_grads: Of every step, see ``fastopt.Optimizer``.

    State: ``exp_avg``, ``exp_avg_sq`` and with AMSGrad ``max_exp_avg_sq`` (float32; float64 for float64 parameters).

    Raises:
        TypeError, ValueError: As for ``fastopt.Optimizer``; ValueError for ``fully_decoupled`` with lr 0 at the start.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv:1711.05101, Algorithm 2.

    Example:
        >>> import numpy as np, fastopt
        >>> params = fastopt.FlatBuffer.from_arrays({"w": np.ones(2), "b": np.zeros(1)})
        >>> opt = fastopt.AdamW(params, lr=0.1, weight_decay=0.5)
        >>> grads = params.zeros_like()
        >>> grads["w"][:] = 2.0, -2.0
        >>> info = opt.step(grads, max_norm=1.0)
        >>> params["w"].round(3).tolist(), round(info.grad_norm, 3)
        ([0.85, 1.05], 2.828)
    """

    rule = RULES["adamw"]

    def complete(self, group: dict[str, Any]) -> None:  # noqa: D102 - see Optimizer
        if group.get("fully_decoupled"):
            group.setdefault("initial_lr", group["lr"])
