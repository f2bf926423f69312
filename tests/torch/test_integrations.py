"""Trainers that own the loop drive fastopt.torch as they drive torch.optim: Hugging Face, Accelerate, Lightning.

Each wraps the optimizer, steps it with a closure or a schedule, clips gradients and restores its state in its own way.
"""

import importlib.util

import pytest

torch = pytest.importorskip("torch")
import fastopt.torch  # noqa: E402

pytestmark = [
    pytest.mark.full,
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # the packages' own; they are imported in the tests, hence not before this
]
AdamW = {"fastopt": fastopt.torch.AdamW, "torch": torch.optim.AdamW}


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f'needs {", ".join(missing)}: pip install "fastopt[integrations]"')


def assert_close(ours, theirs, atol=1e-5):
    """As close as two right optimizers are after some steps of a hundredth each."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def assert_equal(first, second):
    """The same bits."""
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# --- Hugging Face --------------------------------------------------------------------------------------------------


def trainer(folder, optimizer=None, handed_over=None, **arguments):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    set_seed(0)
    config = GPT2Config(vocab_size=10, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)  # with dropout: a resumed run must find the same random numbers
    rows = [[(start + i) % 10 for i in range(8)] for start in range(10)]
    settings = dict(max_steps=12, learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, save_steps=6)
    settings |= dict(per_device_train_batch_size=4, max_grad_norm=0.5) | arguments
    quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no")
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **quiet, **settings),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=optimizer,
        optimizers=(handed_over(model) if handed_over else None, None),
    )


def trained(folder, *args, **kwargs):
    run = trainer(folder, *args, **kwargs)
    run.train()
    return run.model


def logits(model):
    """What the model has learned. Not its weights: biases of keys have no effect, and gradients of rounding alone."""
    with torch.no_grad():
        return [model.eval()(torch.arange(8)[None]).logits]


@needs("transformers", "accelerate")
@pytest.mark.parametrize(
    "arguments",
    [
        lambda cls: {"optimizer": (cls, {"lr": 1e-2})},
        lambda cls: {"optimizer": (cls, {"lr": 1e-2}), "gradient_accumulation_steps": 2},
        lambda cls: {"handed_over": lambda model: cls(model.parameters(), lr=1e-2)},
    ],
    ids=["class", "accumulated", "handed over"],
)
def test_trainer_clips_and_schedules_as_with_torch(tmp_path, arguments):
    ours, theirs = (trained(tmp_path / name, **arguments(cls), save_strategy="no") for name, cls in AdamW.items())
    assert_close(logits(ours), logits(theirs), 1e-4)


@needs("transformers", "accelerate")
def test_trainer_with_clipping_in_the_step(tmp_path):
    inside = {"lr": 1e-2, "max_grad_norm": 0.5}
    ours = trained(tmp_path / "fastopt", (AdamW["fastopt"], inside), max_grad_norm=0, save_strategy="no")
    theirs = trained(tmp_path / "torch", (AdamW["torch"], {"lr": 1e-2}), save_strategy="no")
    assert_close(logits(ours), logits(theirs), 1e-4)


@needs("transformers", "accelerate")
def test_trainer_resumes_with_the_same_bits(tmp_path):
    optimizer = AdamW["fastopt"], {"lr": 1e-2}
    whole = weights(trained(tmp_path, optimizer))
    resumed = trainer(tmp_path, optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(weights(resumed.model), whole)


# --- Accelerate ----------------------------------------------------------------------------------------------------


def accelerated(cls, steps=8, save=None, resume=None, **arguments):
    """Train with Accelerate's wrapped optimizer and schedule, two batches to a step; save or resume at step 4."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # otherwise the first of a process decides for all
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **arguments)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = cls(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    batches = [(x, x.sum(dim=1, keepdim=True)) for x in torch.randn(2 * steps, 16, 4)]
    if resume is not None:
        accelerator.load_state(resume)
        batches = batches[8:]
    for k, (x, y) in enumerate(batches):
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if save is not None and k == 7:
            accelerator.save_state(save)
    return weights(model)


@needs("accelerate")
@pytest.mark.parametrize("arguments", [{}, {"mixed_precision": "bf16"}], ids=str)
def test_accelerate_wraps_it_like_torch(arguments):
    ours, theirs = (accelerated(cls, **arguments) for cls in AdamW.values())
    assert_close(ours, theirs, 1e-3 if arguments else 1e-5)  # 16 bits turn a last bit into a larger one


@needs("accelerate")
def test_accelerate_resumes_with_the_same_bits(tmp_path):
    whole = accelerated(AdamW["fastopt"], save=str(tmp_path))
    assert_equal(accelerated(AdamW["fastopt"], resume=str(tmp_path)), whole)


# --- Lightning -----------------------------------------------------------------------------------------------------


def module(cls, **options):
    import lightning

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

        def training_step(self, batch, index):
            x, y = batch
            return torch.nn.functional.mse_loss(self.layers(x), y)

        def configure_optimizers(self):
            optimizer = cls(self.parameters(), lr=1e-2, **options)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=16)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    lightning.seed_everything(0, verbose=False)
    return Regression()


def fit(model, epochs=4, resume=None, save=None, **arguments):
    import lightning

    lightning.seed_everything(0, verbose=False)
    x = torch.randn(64, 4)
    data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))
    arguments = dict(gradient_clip_val=0.1) | arguments
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    run = lightning.Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **arguments)
    run.fit(model, torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    return weights(model)


@needs("lightning")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "gradient_clip_val": None},  # see below
    ],
    ids=str,
)
def test_lightning_steps_with_its_closure_as_with_torch(arguments):
    ours, theirs = (fit(module(cls), **arguments) for cls in AdamW.values())
    assert_close(ours, theirs, 1e-3 if "precision" in arguments else 1e-5)


@needs("lightning")
def test_lightning_with_clipping_in_the_step():
    ours = fit(module(AdamW["fastopt"], max_grad_norm=0.1), gradient_clip_val=None)
    assert_close(ours, fit(module(AdamW["torch"])))


@needs("lightning")
def test_lightning_in_mixed_precision_clips_only_in_the_step():
    """Lightning refuses to clip for optimizers that unscale gradients themselves, as torch's with fused=True do."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(module(AdamW["fastopt"]), precision="bf16-mixed")
    ours = fit(module(AdamW["fastopt"], max_grad_norm=0.1), precision="bf16-mixed", gradient_clip_val=None)
    assert_close(ours, fit(module(AdamW["torch"]), precision="bf16-mixed"), 1e-3)


@needs("lightning")
def test_lightning_resumes_with_the_same_bits(tmp_path):
    path = str(tmp_path / "half.ckpt")
    whole = fit(module(AdamW["fastopt"]))
    fit(module(AdamW["fastopt"]), epochs=2, save=path)
    assert_equal(fit(module(AdamW["fastopt"]), resume=path), whole)
