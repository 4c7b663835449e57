"""Other engines on the shape of a benchmark, with random weights: greedy tokens for the same prompts and threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from weights.model_config import ModelConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

# (prompts [batch, length], output length): generates; raises AssertionError where an output has another length.
Generate = Callable[[np.ndarray, int], None]


def hugging_face(config: ModelConfig, device: torch.device, dtype: torch.dtype, is_int8: bool) -> Generate:
    """transformers' generate, of a GPT-2."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(_gpt2(config)).to(dtype).to(device).eval()

    @torch.inference_mode()
    def generate(prompts: np.ndarray, output_len: int) -> None:
        ids = torch.as_tensor(prompts, device=device)
        limits = {"max_new_tokens": output_len, "min_new_tokens": output_len}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        assert output.cpu().shape[1] == prompts.shape[1] + output_len

    return generate


def ctranslate2(config: ModelConfig, device: torch.device, dtype: torch.dtype, is_int8: bool) -> Generate:
    """CTranslate2's Generator, of a GPT-2 that its own converter made; its weights in int8 where is_int8.

    Its int8 rounds the activations, too. Needs the package ctranslate2.
    """
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    kind = "int8" if is_int8 else str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder, "source"), Path(folder, "converted")
        _save(config, source)
        TransformersConverter(str(source)).convert(str(converted), quantization=kind)
        threads = torch.get_num_threads()
        model = Generator(str(converted), device=device.type, compute_type=kind, intra_threads=threads, inter_threads=1)

    def generate(prompts: np.ndarray, output_len: int) -> None:
        words = [[_word(token) for token in prompt] for prompt in prompts]
        limits = {"max_length": output_len, "min_length": output_len, "max_batch_size": 0}
        answers = model.generate_batch(words, sampling_topk=1, include_prompt_in_result=False, **limits)
        assert all(len(answer.sequences_ids[0]) == output_len for answer in answers)

    return generate


PEERS = {"hf": hugging_face, "ctranslate2": ctranslate2}


def _gpt2(config: ModelConfig) -> GPT2Config:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_pos_seq_len,
        n_embd=config.hidden_size,
        n_layer=config.num_layer,
        n_head=config.head_num,
        bos_token_id=config.start_id,
        eos_token_id=None,
        pad_token_id=0,
    )


def _save(config: ModelConfig, folder: Path) -> None:
    """A random GPT-2 as files, with a tokenizer of one word for each id, which CTranslate2's converter asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    GPT2LMHeadModel(_gpt2(config)).save_pretrained(folder)
    words = WordLevel({_word(token): token for token in range(config.vocab_size)}, unk_token=_word(0))
    names = {"bos_token": _word(config.start_id), "eos_token": _word(config.end_id), "unk_token": _word(0)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **names).save_pretrained(folder)


def _word(token: int) -> str:
    return f"t{token}"
