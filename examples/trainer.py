"""transformers' Trainer, with one more argument: `python examples/trainer.py [MODEL]` writes ./packed"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import edkm

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
ids = tokenizer("\n\n".join(topics.values())).input_ids  # the reference of the Python that runs this
blocks = [{"input_ids": ids[i : i + 256], "labels": ids[i : i + 256]} for i in range(0, len(ids) - 255, 256)]

arguments = TrainingArguments("training", max_steps=40, learning_rate=1e-4, lr_scheduler_type="constant")
callback = edkm.Callback("packed", edkm.ClusterConfig(bits=3, rows_per_lut=1))
Trainer(model, arguments, train_dataset=blocks, processing_class=tokenizer, callbacks=[callback]).train()
