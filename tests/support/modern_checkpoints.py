"""Tiny random checkpoints of newer GPTs (rotary positions, gates, RMSNorm, grouped queries) in Megatron's formats.

The model is Hugging Face's Nemotron, Llama, Qwen2 or Qwen3, which is the reference too; what Megatron-core and NeMo
make of its weights is written down from NeMo's convert_llama_hf_to_nemo.py, convert_nemotron_nemo_to_hf.py and
convert_qwen2_hf_to_nemo.py, and from nemo/collections/llm/gpt/model/qwen3.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModernGPT:
    """kind: nemotron (LayerNorm1P, squared ReLU, half of each head rotated), llama (RMSNorm, SwiGLU, all rotated),
    qwen2, a llama with biases of q, k and v, or qwen3, a llama with norms of each head's queries and keys.

    None has other biases nor shares its embedding. With `two_matrices`, the gate lies apart from the matrix beside it;
    with `around_zero`, what is stored of the norms' scales is less by 1.
    hidden_size: 0 for heads · head_dim; another is kv_channels' doing. yarn: 0, or the positions of the training before
    YaRN's scaling by `factor`. window: of a qwen2's layers but the first.
    The attributes and `shard` are those that tests.support.nemo_checkpoints' writers ask for.
    """

    kind: str
    kv_heads: int = 4
    two_matrices: bool = False
    around_zero: bool = False
    heads: int = 8
    head_dim: int = 8
    layers: int = 4
    vocab_size: int = 320  # with padding
    num_tokens: int = 303  # of the tokenizer
    positions: int = 80
    inter: int = 96
    eps: float = 1e-5
    base: float = 500.0
    factor: float = 1.0
    yarn: int = 0
    window: int = 0
    seed: int = 0
    hidden_size: int = 0  # 0: heads · head_dim
    hf: Any = field(init=False, compare=False)

    gelu = "erf"
    tied = biased = False

    def __post_init__(self) -> None:
        sizes = dict(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.inter,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
            bos_token_id=self.num_tokens - 1,
            eos_token_id=self.num_tokens - 1,
            pad_token_id=self.num_tokens - 1,
        )
        rope: dict[str, Any] = dict(rope_type="default", rope_theta=self.base)
        if self.yarn:
            yarn = dict(original_max_position_embeddings=self.yarn, truncate=False)
            rope |= dict(rope_type="yarn", factor=self.factor) | yarn
        elif self.factor != 1:
            rope |= dict(rope_type="linear", factor=self.factor)
        torch.manual_seed(self.seed)
        if self.kind == "nemotron":
            rope["partial_rotary_factor"] = 0.5
            config = transformers.NemotronConfig(**sizes, norm_eps=self.eps, rope_parameters=rope)
            model = transformers.NemotronForCausalLM(config)
        elif self.kind == "qwen2":
            window = dict(use_sliding_window=bool(self.window), sliding_window=self.window, max_window_layers=1)
            config = transformers.Qwen2Config(**sizes, rms_norm_eps=self.eps, rope_parameters=rope, **window)
            model = transformers.Qwen2ForCausalLM(config)
        elif self.kind == "qwen3":
            config = transformers.Qwen3Config(**sizes, rms_norm_eps=self.eps, rope_parameters=rope)
            model = transformers.Qwen3ForCausalLM(config)
        else:
            config = transformers.LlamaConfig(**sizes, rms_norm_eps=self.eps, rope_parameters=rope)
            model = transformers.LlamaForCausalLM(config)
        mean = 0.0 if self.kind == "nemotron" else 1.0  # LayerNorm1P's scales lie around 0
        with torch.no_grad():
            for name, weight in model.named_parameters():
                around = mean if "norm" in name and name.endswith("weight") else 0.0
                weight.normal_(around, 0.5 if "embed" in name else 1.6 * self.hidden**-0.5)
        object.__setattr__(self, "hf", model.eval())

    @property
    def hidden(self) -> int:
        return self.hidden_size or self.heads * self.head_dim

    @property
    def settings(self) -> dict[str, Any]:
        """What model_config.yaml says of all this."""
        return dict(
            activation="squared-relu" if self.kind == "nemotron" else "swiglu" if self.two_matrices else "fast-swiglu",
            normalization="layernorm1p" if self.kind == "nemotron" else "rmsnorm",
            num_query_groups=self.kv_heads,
            position_embedding_type="rope",
            rotary_percentage=0.5 if self.kind == "nemotron" else 1.0,
            rotary_base=self.base,
            seq_len_interpolation_factor=None if self.factor == 1 else self.factor,
            bias_activation_fusion=False,
            qkv_bias=self.kind == "qwen2",
            layernorm_zero_centered_gamma=self.around_zero,
            kv_channels=self.head_dim if self.hidden_size else None,
            qk_layernorm=self.kind == "qwen3",
        )

    @property
    def args(self) -> dict[str, Any]:
        """What Megatron-LM's training arguments say of it."""
        return dict(
            swiglu=self.kind != "nemotron",
            squared_relu=self.kind == "nemotron",
            normalization="LayerNorm" if self.kind == "nemotron" else "RMSNorm",
            apply_layernorm_1p=self.kind == "nemotron",
            layernorm_zero_centered_gamma=self.around_zero,  # the same in newer versions
            add_qkv_bias=self.kind == "qwen2",
            qk_layernorm=self.kind == "qwen3",
            group_query_attention=self.kv_heads != self.heads,
            num_query_groups=self.kv_heads if self.kv_heads != self.heads else 1,
            position_embedding_type="rope",
            rotary_percent=0.5 if self.kind == "nemotron" else 1.0,
            rotary_base=int(self.base),
            rotary_seq_len_interpolation_factor=None if self.factor == 1 else int(self.factor),
            add_position_embedding=True,  # an argument's default, which rope overrules
            add_bias_linear=False,
            untie_embeddings_and_output_weights=True,
        )

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Hugging Face's continuation, up to and with the end token."""
        mask = torch.ones(1, len(ids), dtype=torch.int64)  # else it is guessed from pad_token_id
        out = self.hf.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        """Hugging Face's next-token logits [vocab]."""
        with torch.inference_mode():
            return self.hf(torch.tensor([ids])).logits[0, -1].numpy()

    def part(self, layer: int, name: str, kind: str = "weight") -> torch.Tensor:
        """One of a layer's weights by Hugging Face's name."""
        return self.hf.get_parameter(f"model.layers.{layer}.{name}.{kind}").detach()

    @property
    def qkv_kinds(self) -> tuple[str, ...]:
        """What query_key_value has."""
        return ("weight", "bias") if self.kind == "qwen2" else ("weight",)

    def shard(self, tp: int, pp: int, tp_rank: int, pp_rank: int, qkv: str = "n3d") -> Tensors:
        """What one rank of a training holds, under the legacy modules' names."""
        state: Tensors = {}

        def mine(tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor.chunk(tp, axis)[tp_rank].clone()

        if pp_rank == 0:
            state["embedding.word_embeddings.weight"] = mine(self.hf.model.embed_tokens.weight.detach(), 0)
        per_stage = self.layers // pp
        for local in range(per_stage):
            layer, to = pp_rank * per_stage + local, f"encoder.layers.{local}."
            norms = {name: name for name in ("input_layernorm", "post_attention_layernorm")}
            if self.kind == "qwen3":
                norms |= {f"self_attention.{x}_layernorm": f"self_attn.{x}_norm" for x in "qk"}
            for norm, theirs in norms.items():
                state |= self._norm(f"{to}{norm}", self.hf.model.layers[layer].get_submodule(theirs))
            for kind in self.qkv_kinds:
                q, k, v = (self.part(layer, f"self_attn.{name}_proj", kind) for name in "qkv")
                rows = []
                for group in range(tp_rank * self.kv_heads // tp, (tp_rank + 1) * self.kv_heads // tp):
                    size = self.heads * self.head_dim // self.kv_heads
                    rows += [q[group * size : (group + 1) * size]]
                    rows += [part[group * self.head_dim : (group + 1) * self.head_dim] for part in (k, v)]
                state[f"{to}self_attention.query_key_value.{kind}"] = torch.cat(rows)
            state[f"{to}self_attention.dense.weight"] = mine(self.part(layer, "self_attn.o_proj"), 1)
            up = mine(self.part(layer, "mlp.up_proj"), 0)
            if self.kind != "nemotron":
                gate = mine(self.part(layer, "mlp.gate_proj"), 0)
                if self.two_matrices:
                    state[f"{to}mlp.dense_h_to_4h_2.weight"] = up
                up = gate if self.two_matrices else torch.cat([gate, up])
            state[f"{to}mlp.dense_h_to_4h.weight"] = up
            state[f"{to}mlp.dense_4h_to_h.weight"] = mine(self.part(layer, "mlp.down_proj"), 1)
        if pp_rank == pp - 1:
            state |= self._norm("encoder.final_layernorm", self.hf.model.norm)
            state["output_layer.weight"] = mine(self.hf.lm_head.weight.detach(), 0)
        return state

    def _norm(self, name: str, norm: torch.nn.Module) -> Tensors:
        less = {"weight": int(self.around_zero), "bias": 0}
        return {f"{name}.{kind}": weight.detach() - less[kind] for kind, weight in norm.named_parameters()}

    def files(self, tp: int) -> dict[str, bytes]:
        """The files of query_key_value and dense_h_to_4h, as weights.table says of them."""
        files = {}
        for layer in range(self.layers):
            shards = {}  # name -> array, the axis that is split
            for kind in self.qkv_kinds:
                parts = [self.part(layer, f"self_attn.{name}_proj", kind).numpy().T for name in "qkv"]
                if self.kv_heads == self.heads:  # [..., 3, heads · head_dim]
                    shards[f"attention.query_key_value.{kind}"] = np.stack(parts, -2), -1
                else:  # [..., groups, (queries + 2) · head_dim]; with more ranks than groups, a group for each rank
                    copies = max(1, tp // self.kv_heads)
                    queries = np.split(parts[0], self.kv_heads * copies, -1)
                    keys, values = (np.split(part, self.kv_heads, -1) for part in parts[1:])
                    by_group = [(q, keys[i // copies], values[i // copies]) for i, q in enumerate(queries)]
                    grouped = np.stack([np.concatenate(group, -1) for group in by_group], -2)
                    shards[f"attention.query_key_value.{kind}"] = grouped, -2
            up = self.part(layer, "mlp.up_proj").numpy().T
            if self.kind != "nemotron":
                up = np.stack([self.part(layer, "mlp.gate_proj").numpy().T, up], 1)
            shards["mlp.dense_h_to_4h.weight"] = up, -1
            files |= {
                f"model.layers.{layer}.{name}.{rank}.bin": np.ascontiguousarray(array).tobytes()
                for name, (whole, axis) in shards.items()
                for rank, array in enumerate(np.split(whole, tp, axis))
            }
        return files
