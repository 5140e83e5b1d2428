"""MoLF-Efficient with TRL's SFTTrainer: the base stays frozen, and what comes out is one ordinary PEFT adapter.

Type: python examples/sft.py [folder]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from molf import MoLFAdamW, MoLFConfig, RoutingRecorder, apply_molf, molf_param_groups, save_peft_adapter

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/sft")
torch.manual_seed(0)

# Yours: AutoModelForCausalLM and AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
words = ["<eos>", "<pad>", "count", "from", *map(str, range(32))]
numbered = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
numbered.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=numbered, eos_token="<eos>", pad_token="<pad>")
tiny: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Starting weights ten times the usual: adapters can do little with a random base that hardly speaks.
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), num_key_value_heads=1, initializer_range=0.2, **tiny))
model.save_pretrained(folder / "base")
counts = {i: " ".join(str((i + j) % 32) for j in (1, 2, 3)) for i in range(32)}
rows = Dataset.from_list([{"prompt": f"count from {i}", "completion": f" {count}"} for i, count in counts.items()])

model = apply_molf(model, MoLFConfig(r=(4, 8), lora_alpha=8, train_base=False))
optimizer = MoLFAdamW(molf_param_groups(model, lr=1e-2, lora_lr=1e-2, lora_weight_decay=0.01))
routing = RoutingRecorder()
optimizer.register_step_post_hook(lambda *_: routing.record(optimizer.last_routing))

arguments = SFTConfig(
    output_dir=str(folder / "checkpoints"),
    per_device_train_batch_size=8,
    num_train_epochs=20,
    max_grad_norm=1.0,
    bf16=torch.cuda.is_available(),
    logging_steps=20,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = SFTTrainer(
    model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, None)
)
trainer.train()

losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {trainer.state.global_step} steps")
print("updates won:", ", ".join(f"{expert} {share:.0%}" for expert, share in routing.summary()["share"].items()))
save_peft_adapter(model, folder / "adapter", str(folder / "base"))
print(f'next: PeftModel.from_pretrained(base, "{folder}/adapter"), an ordinary LoRA adapter of rank 12')
