"""A tiny random GPT-2, its weights as the op's lists, and Hugging Face's answers.

The lists are made with plain slices, independently of the project.
"""

from typing import Any

import numpy as np
import torch

VOCAB, HIDDEN, HEADS, LAYERS, POSITIONS = 131, 32, 4, 2, 64
PROMPTS = [[5, 17, 99], [1], [44, 3, 3, 120, 7, 63, 20], [130, 0]]
OUTPUT_LEN = 12


def tiny_gpt2(**config: Any) -> Any:
    """A GPT-2 with noisy weights everywhere, so that its text varies and no bias or norm is neutral."""
    import transformers  # takes seconds, which only one rank needs to spend

    sizes = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_positions=POSITIONS)
    sizes |= dict(bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "ln_" in name and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((0.5 if parameter.dim() > 1 else 0.1) * noise + is_gain)
    model.generation_config.pad_token_id = 0
    return model


def shard(full: dict[str, np.ndarray], tp: int = 1, pp: int = 1, rank: int = 0) -> list[torch.Tensor]:
    """The op's list of weights for one rank, from a GPT2LMHeadModel's state."""
    tp_rank, pp_rank = rank % tp, rank // tp
    h_local, i_local = HIDDEN // tp, 4 * HIDDEN // tp
    heads, inner = (
        slice(tp_rank * h_local, (tp_rank + 1) * h_local),
        slice(tp_rank * i_local, (tp_rank + 1) * i_local),
    )

    def qkv(weight: np.ndarray) -> np.ndarray:
        parts = weight.reshape(*weight.shape[:-1], 3, HIDDEN)[..., heads]
        return parts.reshape(*weight.shape[:-1], 3 * h_local)

    kinds = [
        ("ln_1.weight", lambda w: w),
        ("ln_1.bias", lambda w: w),
        ("attn.c_attn.weight", qkv),
        ("attn.c_attn.bias", qkv),
        ("attn.c_proj.weight", lambda w: w[heads]),
        ("attn.c_proj.bias", lambda w: w),
        ("ln_2.weight", lambda w: w),
        ("ln_2.bias", lambda w: w),
        ("mlp.c_fc.weight", lambda w: w[:, inner]),
        ("mlp.c_fc.bias", lambda w: w[inner]),
        ("mlp.c_proj.weight", lambda w: w[inner]),
        ("mlp.c_proj.bias", lambda w: w),
    ]
    arrays = []
    for name, cut in kinds:
        for layer in range(LAYERS):
            here = layer // (LAYERS // pp) == pp_rank
            arrays.append(cut(full[f"transformer.h.{layer}.{name}"]) if here else np.zeros(0, np.float32))
    # A test may put a layernorm behind the embeddings (where GPT-2 has dropout), or take the last one away.
    for norm in ("transformer.drop", "transformer.ln_f"):
        arrays += [full[f"{norm}.{part}"] for part in ("weight", "bias") if f"{norm}.{part}" in full]
    arrays += [full["transformer.wpe.weight"], full["transformer.wte.weight"], full["lm_head.weight"]]
    arrays += [np.zeros(0, np.float32)] * LAYERS
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def make_op(weights: list[torch.Tensor], tp: int = 1, pp: int = 1, **changed: Any) -> Any:
    """The op for the tiny model; `changed` overrides the constructor's arguments by DESIGN.md's names."""
    arguments = dict(
        head_num=HEADS,
        size_per_head=HIDDEN // HEADS,
        inter_size=4 * HIDDEN,
        layer_num=LAYERS,
        expert_num=0,
        moe_k=0,
        moe_layer_index=[],
        vocab_size=VOCAB,
        start_id=VOCAB - 1,
        end_id=VOCAB - 1,
        tensor_para_size=tp,
        pipeline_para_size=pp,
        int8_mode=0,
        layernorm_eps=1e-5,
        layernorm_type="pre_layernorm",
        activation_type="gelu",
        has_positional_encoding=True,
        has_pre_decoder_layernorm=False,
        has_post_decoder_layernorm=True,
        has_adapters=False,
        adapter_inter_size=0,
        use_attention_linear_bias=False,
        weights=weights,
        int8_weights=[],
        scale=[],
        shared_contexts_ratio=1.0,
    )
    unknown = changed.keys() - arguments.keys()
    assert not unknown, unknown
    return torch.classes.FasterTransformer.ParallelGptOp(*(arguments | changed).values())


def run(
    op: Any, prompts: list[list[int]], output_len: int, beam_width: int = 1, log_probs: int = 0, **params: Any
) -> list[torch.Tensor]:
    """One forward; `params` are the optional tensors by DESIGN.md's names."""
    order = [
        "top_k",
        "top_p",
        "beam_search_diversity_rate",
        "temperature",
        "len_penalty",
        "repetition_penalty",
    ]
    order += ["presence_penalty", "min_length", "random_seed", "bad_words_list"]
    assert params.keys() <= set(order), params.keys()
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [77] * (max(lengths) - len(prompt)) for prompt in prompts]
    ids, lengths = torch.tensor(padded, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    return op.forward(ids, lengths, output_len, beam_width, *(params.get(name) for name in order), log_probs)


def new_tokens(outputs: list[torch.Tensor], prompts: list[list[int]]) -> list[list[list[int]]]:
    """[row][beam] -> the generated tokens, up to and with end_id. Asserts each row's prompt at its front."""
    max_len = max(map(len, prompts))
    result = []
    for prompt, ids, lengths in zip(prompts, outputs[0].tolist(), outputs[1].tolist(), strict=True):
        assert all(beam[: len(prompt)] == prompt for beam in ids), (prompt, ids)
        cuts = [len(prompt) + length - max_len for length in lengths]
        result.append([beam[len(prompt) : cut] for beam, cut in zip(ids, cuts, strict=True)])
    return result


def hf_tokens(model: Any, prompt: list[int], output_len: int, **options: Any) -> list[list[int]]:
    """[sequence] -> the new tokens of `generate`, for one prompt alone and without an end token."""
    inputs = torch.tensor([prompt])
    # Without a mask, generate takes tokens that look like padding for padding.
    options |= dict(attention_mask=torch.ones_like(inputs), max_new_tokens=output_len, do_sample=False)
    ids = model.generate(inputs, **options)
    return ids[:, len(prompt) :].tolist()


def hf_log_prob(model: Any, tokens: list[int], start: int) -> float:
    """The sum of the log-probabilities of tokens[start:]."""
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, tokens[i]]) for i in range(start, len(tokens)))
