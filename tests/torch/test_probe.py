"""fastopt.torch asks torch's C interface for gradients: as Python does, and not where it must not."""

import pytest
from torch_compare import assert_same_bits
from torch_problem import LAYOUTS, SHAPES, TORCH, front, params_of, set_gradients, torch, train

pytestmark = pytest.mark.skipif(TORCH < (2, 9), reason="torch's C interface has what is asked from 2.9 on")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_c_interface_and_python_take_the_same_steps(layout, dtype, monkeypatch):
    def run():
        p = params_of(SHAPES, dtype=dtype)
        p.append(torch.nn.Parameter(LAYOUTS[layout](torch.randn(2, 3, 4, 5).to(dtype))))
        opt = front.AdamW(p, lr=0.1)
        for t in range(12):
            set_gradients(p, t)
            p[-1].grad = LAYOUTS[layout](p[-1].grad)
            if t == 5:
                p[1].grad = None
            if t == 6:
                p[0].grad = p[0].grad.t().contiguous().t()
            if t == 7:
                p[1].data = p[1].data.clone()
            opt.step()
        return p, opt.state.watch.derived().only.serving.probe

    p, probe = run()
    assert probe is not None
    monkeypatch.setattr(front._patterns._interface, "library", lambda: None)
    q, probe = run()
    assert probe is None
    assert_same_bits(p, q)


@pytest.mark.parametrize("change", ["gradient", "dtype", "shape", "parameter", "none", "negated"])
def test_the_c_interface_notices_what_changed(change):
    p = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(3))]
    opt = front.SGD(p, lr=0.5)
    train(p, opt, 4)
    probe = opt.state.watch.derived().only.serving.probe
    set_gradients(p, 9)
    assert probe.hold()
    assert probe.pointers.tolist() == [x.grad.data_ptr() for x in p]
    probe.release()
    before, want = [x.detach().clone() for x in p], [x.grad.clone() for x in p]
    if change == "gradient":
        p[1].grad = torch.stack([want[1], want[1]], dim=1)[:, 0]
    if change == "dtype":
        p[1].grad.data = want[1].to(torch.bfloat16)
        want[1] = want[1].to(torch.bfloat16).float()
    if change == "shape":
        p[1].grad.data = torch.ones(4)
        with pytest.raises(ValueError, match="shape"):
            opt.step()
        return
    if change == "parameter":
        p[1].data = p[1].data.clone()
    if change == "none":
        p[1].grad = None
        want[1] = torch.zeros(3)
    if change == "negated":
        p[0].grad = torch.complex(torch.zeros(1), want[0]).conj().imag
        want[0] = -want[0]
    opt.step()
    assert_same_bits(p, [x - 0.5 * g for x, g in zip(before, want, strict=True)])


def test_gradients_live_while_they_are_held_and_no_longer():
    w = params_of([(3,)])
    opt = front.SGD(w, lr=0.5)
    train(w, opt, 4)
    probe, kept = opt.state.watch.derived().only.serving.probe, w[0].grad
    count = kept._use_count()
    assert probe.hold()
    assert kept._use_count() == count + 1
    probe.release()
    assert kept._use_count() == count


def test_autograd_is_told_of_each_step_once():
    p = params_of([(3,), (2, 2)])
    opt = front.SGD(p, lr=0.5)
    before = [x._version for x in p]
    for steps in range(1, 9):  # by Python, and from the third step on by C, with one plan and with another
        train(p[: 2 if steps < 5 else 1], opt, 1)
        opt.zero_grad()
        assert [x._version - v for x, v in zip(p, before, strict=True)] == [steps, min(steps, 4)]


def test_parameters_made_in_inference_mode_are_stepped():
    with torch.inference_mode():
        p = params_of([(3,)])
    q = params_of([(3,)])
    assert torch.equal(*(train(x, front.SGD(x, lr=0.1), 4)[0] for x in (p, q)))
