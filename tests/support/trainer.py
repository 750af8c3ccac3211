"""Helpers for the tests with transformers' Trainer: a small model, examples, a Trainer, and a plain loop."""

import torch
from transformers import Trainer, TrainingArguments

from cotolora import CoTo

STEPS, BATCH, LENGTH, VOCABULARY = 6, 2, 8, 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def llama(layers=4, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(SMALL | settings), num_hidden_layers=layers, num_key_value_heads=2))


def examples(kind, count):
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        tokens = torch.randint(1, VOCABULARY - 1, (LENGTH,), generator=draw)
        pixels = torch.randn(1, 16, 16, generator=draw)
        found.append({
            "vit": {"pixel_values": pixels, "labels": tokens[0] % 4},
            "clip": {"input_ids": tokens, "pixel_values": pixels, "return_loss": True},
        }.get(kind, {"input_ids": tokens, "labels": tokens}))  # fmt: skip
    return found


def collate(batch):
    return {name: torch.stack([e[name] for e in batch]) if name != "return_loss" else True for name in batch[0]}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(model, path, kind="llama", callbacks=(), **arguments):
    settings = {
        "output_dir": str(path), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": False, "dataloader_pin_memory": False,
    }  # fmt: skip
    optimizer = schedule = None
    if "optim" not in arguments:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return InOrder(
        model, TrainingArguments(**settings | arguments), train_dataset=examples(kind, 64), data_collator=collate,
        callbacks=list(callbacks), optimizers=(optimizer, schedule), eval_dataset=examples(kind, 2),
    )  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loop(model, *, seed=0, kind="llama"):
    """The training loop that the callback must equal; as in Trainer, the loss is the mean over all tokens of a step."""
    first = 1 if kind == "llama" else 0  # Trainer does not recognise that gpt2's loss shifts the labels
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    coto = CoTo(model, STEPS, seed=seed)
    coto.attach(optimizer)
    data = iter(examples(kind, 64))
    model.train()
    for _ in range(STEPS):
        batch = collate([next(data) for _ in range(BATCH)])
        items = torch.tensor(float(batch["labels"][:, first:].numel()))
        model(**batch, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        coto.step()
    coto.finish()
    return weights(model)
