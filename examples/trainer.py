"""MoLF with transformers' Trainer: nothing to subclass, the optimizer is handed over.

Type: python examples/trainer.py [folder]
"""

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from molf import MoLFAdamW, MoLFConfig, RoutingRecorder, apply_molf, merge_molf, molf_param_groups

folder = sys.argv[1] if len(sys.argv) > 1 else "build/trainer"
torch.manual_seed(0)

# Yours: AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
tiny: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **tiny))
rows = [
    {"input_ids": ids, "labels": ids}
    for ids in ((start + stride * torch.arange(12)) % 32 for start in range(32) for stride in (1, 2, 3))
]

model = apply_molf(model, MoLFConfig(r=(8,), lora_alpha=8))
optimizer = MoLFAdamW(molf_param_groups(model, lr=5e-3, lora_lr=5e-3, weight_decay=0.1, lora_weight_decay=0.01))
# The Trainer hides the optimizer behind its own wrapper; a hook of torch's sees every step.
routing = RoutingRecorder()
optimizer.register_step_post_hook(lambda *_: routing.record(optimizer.last_routing))

arguments = TrainingArguments(
    output_dir=f"{folder}/checkpoints",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    num_train_epochs=10,
    lr_scheduler_type="linear",
    warmup_steps=4,
    max_grad_norm=1.0,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
trainer.train()

losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {trainer.state.global_step} steps")
print("updates won:", ", ".join(f"{expert} {share:.0%}" for expert, share in routing.summary()["share"].items()))
merge_molf(model).save_pretrained(folder)  # unmerged it would hold experts, which only apply_molf's model can load
print(f'next: AutoModelForCausalLM.from_pretrained("{folder}"), an ordinary model')
