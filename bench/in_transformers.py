"""What transformers makes of exported folders: run in its own environment (environments.py), it imports nothing of ours.

    .venv-transformers/bin/python bench/in_transformers.py PROMPT DIR [DIR ...]      writes results.json

Per folder: the model's class, the prompt's ids, their logits, 32 greedy tokens and the text of it all. What it loaded it
saves again as DIR-saved, in small shards.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

prompt, results = sys.argv[1], {}
for name in sys.argv[2:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]
    results[name] = {
        "class": type(model).__name__, "ids": ids.tolist(), "logits": logits.tolist(),
        "tokens": tokens[len(ids) :].tolist(), "prompt": tokenizer.decode(ids, skip_special_tokens=True),
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
    }  # fmt: skip
    model.save_pretrained(f"{name}-saved", max_shard_size="20KB")
    tokenizer.save_pretrained(f"{name}-saved")
with open("results.json", "w") as file:
    json.dump(results, file)
