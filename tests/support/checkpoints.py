"""Tiny random checkpoints and tokenizers for the tests, made by transformers' own classes, without a network."""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = "<|endoftext|>"


def make_gpt2(
    folder: Path,
    vocab_size: int = 131,
    layers: int = 4,
    heads: int = 4,
    hidden: int = 64,
    n_positions: int = 256,
    seed: int = 0,
    shards: int = 1,
    format: str = "safetensors",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
    **settings: Any,
) -> transformers.GPT2LMHeadModel:
    """Write a GPT-2 to `folder` and return it, in eval mode.

    Every weight is random, so that no bias or norm is neutral; the end token is the vocabulary's last id.
    `format` is safetensors or bin, `shards` the number of weight files; `settings` are more of GPT2Config's.
    """
    eos = vocab_size - 1
    config = transformers.GPT2Config(
        **dict(vocab_size=vocab_size, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=n_positions),
        **dict(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, tie_word_embeddings=tied),
        **settings,
    )
    model = randomize(transformers.GPT2LMHeadModel(config), seed).to(dtype)
    save(model, folder, format, shards)
    if with_tokenizer:
        make_tokenizer(folder, vocab_size)
    return model


def make_opt(
    folder: Path,
    vocab_size: int = 303,
    layers: int = 4,
    heads: int = 4,
    hidden: int = 64,
    n_positions: int = 128,
    seed: int = 0,
    shards: int = 1,
    format: str = "safetensors",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> transformers.OPTForCausalLM:
    """Write an OPT to `folder` and return it, as `make_gpt2` does, without a tokenizer."""
    settings = {"word_embed_proj_dim": hidden, "ffn_dim": 96, **settings}
    config = transformers.OPTConfig(
        **dict(vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads),
        **dict(bos_token_id=2, eos_token_id=vocab_size - 1, pad_token_id=1, tie_word_embeddings=tied),
        max_position_embeddings=n_positions,
        **settings,
    )
    model = randomize(transformers.OPTForCausalLM(config), seed).to(dtype)
    save(model, folder, format, shards)
    return model


def make_bloom(
    folder: Path,
    vocab_size: int = 303,
    layers: int = 4,
    heads: int = 4,
    hidden: int = 64,
    seed: int = 0,
    shards: int = 1,
    format: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> transformers.BloomForCausalLM:
    """Write a BLOOM to `folder` and return it, as `make_gpt2` does, without a tokenizer."""
    config = transformers.BloomConfig(
        **dict(vocab_size=vocab_size, hidden_size=hidden, n_layer=layers, n_head=heads),
        **dict(bos_token_id=1, eos_token_id=vocab_size - 1, pad_token_id=3),
        **settings,
    )
    model = randomize(transformers.BloomForCausalLM(config), seed).to(dtype)
    save(model, folder, format, shards)
    return model


def randomize(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """Fill every parameter with normal noise of 0.1, around 1 for a layernorm's weight; sets eval mode."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    scales = {id(norm.weight) for norm in norms if norm.weight is not None}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise + float(id(parameter) in scales))
    return model.eval()


def save(model: transformers.PreTrainedModel, folder: Path, format: str = "safetensors", shards: int = 1) -> None:
    """Write a model's config and weights; a tied head is stored in .bin files only, as transformers does it.

    The files are written here, as transformers 5 writes no .bin files and splits by size only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="1TB")
    if format == "safetensors" and shards == 1:
        return
    (folder / "model.safetensors").unlink()
    tensors = dict(model.state_dict())
    if format == "safetensors" and model.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    write_weights(folder, tensors, format, shards)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], format: str, shards: int = 1) -> None:
    """Write tensors as one file or several with an index, under the Hub's names."""
    stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[format]
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {key: tensors[key] for key in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]}
        weight_map |= dict.fromkeys(part, name)
        if format == "bin":
            torch.save(part, folder / name)
        else:
            save_file({key: tensor.contiguous() for key, tensor in part.items()}, folder / name, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def make_tokenizer(folder: Path, vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer that fills the vocabulary: bytes, then pairs, then the end token.

    With 257 tokens or more every byte has a token of its own; with fewer, letters and punctuation come first.
    """
    symbols = _byte_symbols()[: vocab_size - 1]
    num_pairs = vocab_size - 1 - len(symbols)
    letters = [symbol for symbol in symbols if symbol in "etaoinshrdlucmfwypvbgkjqxzĠ"]
    merges = [pair for pair, _ in zip(product(letters, letters), range(num_pairs), strict=False)]
    known = set(merges)
    merges += islice((pair for pair in product(symbols, symbols) if pair not in known), num_pairs - len(merges))
    vocab = {token: i for i, token in enumerate([*symbols, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab | {EOS: vocab_size - 1}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=EOS, eos_token=EOS, unk_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, ASCII's visible ones and white space first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = [symbol for symbol in alphabet if ord(symbol) < 256]  # stand for the byte of the same number
    moved = [symbol for symbol in alphabet if ord(symbol) >= 256]  # stand for the other bytes, in order
    numbers = [n for n in range(256) if n not in {ord(symbol) for symbol in plain}]
    of_byte = {ord(symbol): symbol for symbol in plain} | dict(zip(numbers, moved, strict=True))
    first = [*range(32, 127), 10, 9]
    return [of_byte[n] for n in [*first, *(n for n in range(256) if n not in first)]]
