"""MoLF in a bare torch loop: a tiny model learns to count, and is saved as an ordinary one.

Type: python examples/loop.py [folder]
"""

import sys
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from molf import MoLFAdamW, MoLFConfig, RoutingRecorder, apply_molf, merge_molf, molf_param_groups

STEPS, MICRO_BATCHES = 60, 2
folder = sys.argv[1] if len(sys.argv) > 1 else "build/loop"
torch.manual_seed(0)

# Yours: AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
tiny: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, num_key_value_heads=1, **tiny))
model = apply_molf(model, MoLFConfig(r=(8,), lora_alpha=8))
optimizer = MoLFAdamW(molf_param_groups(model, lr=5e-3, lora_lr=5e-3, weight_decay=0.1, lora_weight_decay=0.01))
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
routing = RoutingRecorder()

losses = []
for _ in range(STEPS):
    total = 0.0
    for _ in range(MICRO_BATCHES):
        start, stride = torch.randint(32, (16, 1)), torch.randint(1, 4, (16, 1))
        ids = (start + stride * torch.arange(12)) % 32
        loss = model(input_ids=ids, labels=ids).loss / MICRO_BATCHES
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    routing.record(optimizer.last_routing)
    schedule.step()
    optimizer.zero_grad()
    losses.append(total)

print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps")
print("updates won:", ", ".join(f"{expert} {share:.0%}" for expert, share in routing.summary()["share"].items()))
merge_molf(model).save_pretrained(folder)  # unmerged it would hold experts, which only apply_molf's model can load
print(f'next: AutoModelForCausalLM.from_pretrained("{folder}"), an ordinary model')
