"""Text encoders as transformers writes them (CLIPTextModel): their sizes, padding and weights."""

import json
import os

import torch

from plumbing.checkpoint import UNREADABLE
from plumbing.cli import UsageError
from plumbing.text import END_OF_TEXT
from published.weights import folder_tensors


def size_and_pad(folder):
    """config.json of a CLIPTextModel -> (sizes as in TEXT_ENCODERS, id of the padding token)."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        size = {"width": config["hidden_size"], "heads": config["num_attention_heads"],
                "layers": config["num_hidden_layers"],
                "context_length": config["max_position_embeddings"],
                "mlp_ratio": config["intermediate_size"] / config["hidden_size"]}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: expected the configuration of a CLIPTextModel, as transformers "
                         f"writes it ({error!r}).") from None
    if config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{path}: hidden_act is {config['hidden_act']!r}, expected gelu, as in "
                         "the CLIP towers of laion.")
    token, ids = "<|endoftext|>", {"<|endoftext|>": END_OF_TEXT, "!": 0}
    beside = os.path.join(os.path.dirname(os.path.normpath(folder)), "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = os.path.join(beside, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file).get("pad_token") or token
            token = found["content"] if isinstance(found, dict) else found
            break
    if token not in ids:
        raise UsageError(f"{path}: pads with {token!r}, expected one of {', '.join(ids)}.")
    return size, ids[token]


def weights(folder):
    """The weights of a CLIPTextModel, by the names that open_clip gives them."""
    try:
        found = folder_tensors(folder, "model", "pytorch_model")
    except UNREADABLE as error:
        raise UsageError(f"{folder}: expected a model.safetensors (or pytorch_model.bin) that can "
                         f"be read: {str(error).splitlines()[0][:160]}.") from None
    state = {}
    for name, value in found.items():
        name = name.removeprefix("text_model.")
        for theirs, ours in (
                ("embeddings.token_embedding.", "token_embedding."),
                ("embeddings.position_embedding.weight", "positional_embedding"),
                ("encoder.layers.", "transformer.resblocks."), ("layer_norm1.", "ln_1."),
                ("layer_norm2.", "ln_2."), ("self_attn.out_proj.", "attn.out_proj."),
                ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
                ("final_layer_norm.", "ln_final.")):
            name = name.replace(theirs, ours)
        state[name] = value
    for name in [name for name in state if ".self_attn.q_proj." in name]:  # q, k, v: one matrix
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return {name: value for name, value in state.items()
            if name != "embeddings.position_ids"}  # a buffer of older transformers
