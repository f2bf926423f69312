"""Hugging Face's Trainer: fastopt's optimizer in its place, clipping inside the step, and a resumed run."""

import tempfile

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from fastopt.torch import AdamW


def trainer(folder: str) -> Trainer:
    set_seed(0)
    config = GPT2Config(vocab_size=10, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    counting = [[(start + i) % 10 for i in range(16)] for start in range(10)]
    return Trainer(
        model=GPT2LMHeadModel(config),  # tiny, and its weights are random: nothing is downloaded
        args=TrainingArguments(
            output_dir=folder,
            max_steps=60,
            per_device_train_batch_size=10,
            learning_rate=2e-2,
            weight_decay=0.01,
            warmup_steps=6,
            save_steps=30,
            max_grad_norm=0,  # the optimizer clips
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in counting],
        # Trainer adds its param groups (no weight decay of biases and norms) and its schedule. An optimizer of your own
        # works as well: optimizers=(AdamW(model.parameters(), lr=2e-2), None).
        optimizer_cls_and_kwargs=(AdamW, {"lr": 2e-2, "max_grad_norm": 1.0}),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(folder).train()
        print(f"mean of 60 steps {whole.training_loss:.4f}")
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-30")
        batch = resumed.data_collator([resumed.train_dataset[k] for k in range(10)])
        print(f"loss {resumed.model.eval()(**batch).loss.item():.4f}")


if __name__ == "__main__":
    main()
