"""Packed checkpoints through transformers, on the CPU. Without transformers there is nothing to test."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402

import liquidgemm as lg  # noqa: E402
import liquidgemm.transformers  # noqa: E402, F401
from liquidgemm.torch import LiquidLinear, replace_linears  # noqa: E402


def small_model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def packed_folder(folder: Path):
    """Writes what `liquidgemm quantize` would write, and returns the model with the same layers."""
    model = small_model()
    names = replace_linears(model)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "liquidgemm", "format_version": 1, "bits": 4, "activation_bits": 8, "method": "rtn",
        "group": "64", "quantized_modules": names, "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(12).view(1, 12)).logits


def test_a_packed_folder_loads_and_survives_saving(tmp_path: Path):
    model = packed_folder(tmp_path)
    expected = logits(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, LiquidLinear)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert torch.equal(logits(loaded), expected)

    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["method"] == "rtn"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(logits(again), expected)


def test_generation_runs(tmp_path: Path):
    packed_folder(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = model.generate(torch.arange(5).view(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 9)


@pytest.mark.parametrize(
    "key, value, text",
    [("format_version", 2, "version 2"), ("quantized_modules", ["model.layers.0.mlp.up_proj"], "do not agree")],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, key, value, text):
    packed_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lg.InvalidArgumentError, match=text):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
