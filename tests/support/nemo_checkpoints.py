"""Tiny random checkpoints in the file formats of NeMo and Megatron-LM, an fp32 reference model, and FT's files of it.

Everything is written down from the formats alone: nothing here imports a reader or weights.table.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.support.checkpoints import make_tokenizer

EOS = "<|endoftext|>"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinyGPT:
    """A GPT's weights, each matrix [out, in], q, k and v apart: `layers.{L}.{q,k,v}.{weight,bias}`, by head."""

    heads: int = 4
    head_dim: int = 8
    layers: int = 4
    vocab_size: int = 320  # with padding
    num_tokens: int = 303  # of the tokenizer
    positions: int = 64
    inter: int = 96
    eps: float = 1e-5
    gelu: str = "tanh"
    tied: bool = True
    biased: bool = True
    seed: int = 0
    weights: Tensors = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        h, generator = self.hidden, torch.Generator().manual_seed(self.seed)

        def put(name: str, *shape: int, mean: float = 0.0, scale: float = 0.15) -> None:
            self.weights[name] = mean + scale * torch.randn(shape, generator=generator)

        put("wte", self.vocab_size, h, scale=0.5)
        put("wpe", self.positions, h, scale=0.5)
        for part in [f"layers.{i}.{part}" for i in range(self.layers) for part in ("ln1", "ln2")] + ["ln_f"]:
            put(f"{part}.weight", h, mean=1.0)
            put(f"{part}.bias", h)
        for i in range(self.layers):
            for part, rows, columns in (
                *((part, h, h) for part in ("q", "k", "v", "dense")),
                ("fc1", self.inter, h),
                ("fc2", h, self.inter),
            ):
                put(f"layers.{i}.{part}.weight", rows, columns)
                put(f"layers.{i}.{part}.bias", rows, scale=0.15 * self.biased)
        if not self.tied:
            put("head", self.vocab_size, h)

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def logits(self, ids: list[int]) -> torch.Tensor:
        """The reference: next-token logits [vocab] after `ids`, of a GPT with LayerNorm first, in fp32."""
        w, length = self.weights, len(ids)

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

        def gelu(x: torch.Tensor) -> torch.Tensor:
            if self.gelu == "erf":
                return x * 0.5 * (1 + torch.erf(x / 2**0.5))
            return x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

        x = w["wte"][ids] + w["wpe"][:length]
        future = torch.ones(length, length).triu(1).bool()
        for i in range(self.layers):
            y = norm(x, f"layers.{i}.ln1")
            q, k, v = (linear(y, f"layers.{i}.{p}").view(length, self.heads, -1).transpose(0, 1) for p in "qkv")
            scores = (q @ k.transpose(1, 2) / self.head_dim**0.5).masked_fill(future, -torch.inf)
            y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
            x = x + linear(y, f"layers.{i}.dense")
            x = x + linear(gelu(linear(norm(x, f"layers.{i}.ln2"), f"layers.{i}.fc1")), f"layers.{i}.fc2")
        return norm(x[-1], "ln_f") @ w["wte" if self.tied else "head"].T

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The reference's continuation of at most `count` tokens, up to and with the end token."""
        out: list[int] = []
        while len(out) < count and (not out or out[-1] != self.num_tokens - 1):
            out.append(int(self.logits(ids + out).argmax()))
        return out

    def files(self, tp: int, dtype: type = np.float32) -> dict[str, bytes]:
        """FasterTransformer's files, as its converters' sources say."""
        w = {name: tensor.numpy().astype(dtype) for name, tensor in self.weights.items()}
        files = {"wte": w["wte"], "wpe": w["wpe"]} | ({} if self.tied else {"lm_head.weight": w["head"]})
        files |= {f"final_layernorm.{kind}": w[f"ln_f.{kind}"] for kind in ("weight", "bias")}
        for i in range(self.layers):
            a, b = f"layers.{i}.", f"layers.{i}."
            for kind in ("weight", "bias"):
                files[f"{b}input_layernorm.{kind}"] = w[f"{a}ln1.{kind}"]
                files[f"{b}post_attention_layernorm.{kind}"] = w[f"{a}ln2.{kind}"]
            files[f"{b}attention.dense.bias"] = w[f"{a}dense.bias"]
            files[f"{b}mlp.dense_4h_to_h.bias"] = w[f"{a}fc2.bias"]
            for r in range(tp):

                def mine(array: np.ndarray, axis: int, rank: int = r) -> np.ndarray:
                    return np.split(array, tp, axis)[rank]

                qkv = [mine(w[f"{a}{p}.weight"].T, 1) for p in "qkv"]
                files[f"{b}attention.query_key_value.weight.{r}"] = np.stack(qkv, 1)
                files[f"{b}attention.query_key_value.bias.{r}"] = np.stack([mine(w[f"{a}{p}.bias"], 0) for p in "qkv"])
                files[f"{b}attention.dense.weight.{r}"] = mine(w[f"{a}dense.weight"].T, 0)
                files[f"{b}mlp.dense_h_to_4h.weight.{r}"] = mine(w[f"{a}fc1.weight"].T, 1)
                files[f"{b}mlp.dense_h_to_4h.bias.{r}"] = mine(w[f"{a}fc1.bias"], 0)
                files[f"{b}mlp.dense_4h_to_h.weight.{r}"] = mine(w[f"{a}fc2.weight"].T, 0)
        return {f"model.{name}.bin": np.ascontiguousarray(array).tobytes() for name, array in files.items()}

    def shard(self, tp: int, pp: int, tp_rank: int, pp_rank: int, qkv: str = "n3d") -> Tensors:
        """What one rank of a training holds, under the legacy modules' names; qkv's rows in the order given."""
        w, legacy = self.weights, {}

        def mine(tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor.chunk(tp, axis)[tp_rank].clone()

        def by_head(name: str, kind: str) -> torch.Tensor:
            parts = torch.stack([mine(w[f"{name}.{p}.{kind}"], 0) for p in "qkv"])
            parts = parts.view(3, self.heads // tp, self.head_dim, *parts.shape[2:])
            order = {"n3d": (1, 0, 2), "3nd": (0, 1, 2), "nd3": (1, 2, 0)}[qkv]
            return parts.permute(*order, *range(3, parts.ndim)).reshape(-1, *parts.shape[3:]).clone()

        if pp_rank == 0:
            legacy["embedding.word_embeddings.weight"] = mine(w["wte"], 0)
            legacy["embedding.position_embeddings.weight"] = w["wpe"]
        per_stage = self.layers // pp
        for local in range(per_stage):
            name, to = f"layers.{pp_rank * per_stage + local}", f"encoder.layers.{local}."
            for kind in ("weight", "bias"):
                legacy[f"{to}input_layernorm.{kind}"] = w[f"{name}.ln1.{kind}"]
                legacy[f"{to}post_attention_layernorm.{kind}"] = w[f"{name}.ln2.{kind}"]
            for kind in ("weight", "bias") if self.biased else ("weight",):
                legacy[f"{to}self_attention.query_key_value.{kind}"] = by_head(name, kind)
                legacy[f"{to}mlp.dense_h_to_4h.{kind}"] = mine(w[f"{name}.fc1.{kind}"], 0)
            legacy[f"{to}self_attention.dense.weight"] = mine(w[f"{name}.dense.weight"], 1)
            legacy[f"{to}mlp.dense_4h_to_h.weight"] = mine(w[f"{name}.fc2.weight"], 1)
            if self.biased:
                legacy[f"{to}self_attention.dense.bias"] = w[f"{name}.dense.bias"]
                legacy[f"{to}mlp.dense_4h_to_h.bias"] = w[f"{name}.fc2.bias"]
        if pp_rank == pp - 1:
            legacy |= {f"encoder.final_layernorm.{kind}": w[f"ln_f.{kind}"] for kind in ("weight", "bias")}
            if not self.tied:
                legacy["output_layer.weight"] = mine(w["head"], 0)
            elif pp > 1:
                legacy["word_embeddings.weight"] = mine(w["wte"], 0)
        return legacy


def write_nemo(
    target: Path,
    model: TinyGPT,
    tp: int = 1,
    pp: int = 1,
    style: str = "legacy",
    packed: str = "w:",
    dtype: torch.dtype = torch.float32,
    edit: Callable[[Path], Any] = lambda folder: None,
    **settings: Any,
) -> Path:
    """Write `target`, a .nemo archive (`packed` "w:" or "w:gz") or, with "", the unpacked folder.

    `style`: legacy, core, or amp (core's names with `.module`); `edit` may spoil the folder before it is packed.
    """
    folder = target if not packed else target.with_suffix(".unpacked")
    folder.mkdir(parents=True)
    vocab, merges = write_bpe(folder, model.num_tokens, prefix="0123abcd_gpt2-")
    config = dict(
        target="nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        mcore_gpt=style != "legacy",
        encoder_seq_length=model.positions,
        max_position_embeddings="${.encoder_seq_length}",
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.inter,
        num_attention_heads=model.heads,
        layernorm_epsilon=model.eps,
        kv_channels=None,
        make_vocab_size_divisible_by=16,
        activation="gelu",
        bias=model.biased,
        bias_activation_fusion=model.gelu == "tanh",
        share_embeddings_and_output_weights=model.tied,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        tokenizer=dict(library="megatron", type="GPT2BPETokenizer", model=None, vocab_file=f"nemo:{vocab}")
        | dict(merge_file=f"nemo:{merges}", delimiter=None, sentencepiece_legacy=False),
    )
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config | settings))
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            state = {name: tensor.to(dtype) for name, tensor in model.shard(tp, pp, tp_rank, pp_rank).items()}
            path = folder / rank_folder(tp, pp, tp_rank, pp_rank) / "model_weights.ckpt"
            path.parent.mkdir(exist_ok=True)
            torch.save(nemo_names(state, style), path)
    edit(folder)
    if packed:
        with tarfile.open(target, packed) as tar:
            tar.add(folder, arcname=".")
    return target


def rank_folder(tp: int, pp: int, tp_rank: int, pp_rank: int) -> str:
    """NeMo's folder of one rank."""
    if tp == pp == 1:
        return "."
    return f"mp_rank_{tp_rank:02d}" if pp == 1 else f"tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:03d}"


def nemo_names(state: Tensors, style: str) -> dict[str, Any]:
    """Legacy modules' names → what NeMo stores."""
    if style == "legacy":
        state = {name if name.startswith("word_") else f"language_model.{name}": t for name, t in state.items()}
        return {f"model.{name}": tensor for name, tensor in state.items()}
    core: dict[str, Any] = {}
    for name, tensor in state.items():
        for theirs, ours in (
            ("encoder.", "decoder."),
            ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            ("post_attention_layernorm.", "mlp.linear_fc1.layer_norm_"),
            ("query_key_value", "linear_qkv"),
            ("self_attention.dense", "self_attention.linear_proj"),
            ("dense_h_to_4h", "linear_fc1"),
            ("dense_4h_to_h", "linear_fc2"),
        ):
            name = name.replace(theirs, ours)
        core["output_layer.weight" if name == "word_embeddings.weight" else name] = tensor
    # What Transformer Engine keeps for fp8: nothing without it, and since 2.0 an empty tensor.
    core["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    core["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8")
    core["decoder.layers.1.self_attention.linear_qkv._extra_state"] = torch.empty(0, dtype=torch.uint8)
    return {f"model.{'module.' if style == 'amp' else ''}{name}": value for name, value in core.items()}


def write_megatron(
    folder: Path,
    model: TinyGPT,
    version: float = 3.0,
    tp: int = 1,
    pp: int = 1,
    naming: str = "mp",
    iteration: int | str = 500,
    with_args: bool = True,
    zipped: bool = True,
    edit: Callable[[Path], Any] = lambda folder: None,
    **settings: Any,
) -> Path:
    """Write a folder of Megatron-LM with its tracker file, one iteration, and GPT-2's files beside.

    `naming`: mp (mp_rank_XX, mp_rank_XX_YYY) or tp (tp_rank_XX_pp_rank_YYY); `zipped`: PyTorch's format from 1.6 on.
    """
    name = iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    write_bpe(folder, model.num_tokens)
    args = argparse.Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.inter,
        num_attention_heads=model.heads,
        kv_channels=model.head_dim,
        max_position_embeddings=model.positions,
        layernorm_epsilon=model.eps,
        make_vocab_size_divisible_by=16,
        padded_vocab_size=model.vocab_size,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        bias_gelu_fusion=model.gelu == "tanh",
        openai_gelu=False,
        params_dtype=torch.float32,
        **settings,
    )
    order = {0: "3nd", 1.0: "nd3"}.get(version, "n3d")
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            rank = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else "")
            if naming == "tp":
                rank = f"tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:03d}"
            state = megatron_state(model.shard(tp, pp, tp_rank, pp_rank, order), version)
            content = {"iteration": 500, "model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
            content |= {"args": args} if with_args else {}
            content |= {"checkpoint_version": version} if version else {}
            if with_args:
                content |= {"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}
            (folder / name / rank).mkdir(parents=True)
            path = folder / name / rank / "model_optim_rng.pt"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
    edit(folder)
    return folder


def megatron_state(state: Tensors, version: float) -> dict[str, Any]:
    """Legacy modules' names → Megatron-LM's nested state dict; before 2.0 the encoder was called transformer."""
    blocks: dict[str, Any] = {"language_model": {}}
    language_model = blocks["language_model"]
    for name, tensor in state.items():
        block, _, rest = name.partition(".")
        if block == "encoder" and version < 2:
            block, rest = "transformer", rest.replace("self_attention", "attention")
        if block == "word_embeddings":
            blocks["word_embeddings_for_head"] = {"weight": tensor}
        elif block == "embedding":
            part, _, kind = rest.partition(".")
            language_model.setdefault(block, {}).setdefault(part, {})[kind] = tensor
        else:
            language_model.setdefault(block, {})[rest] = tensor
    return blocks


def write_bpe(folder: Path, num_tokens: int, prefix: str = "") -> tuple[str, str]:
    """Write the tests' byte-level BPE as GPT-2's two files and return their names."""
    vocab, merges = f"{prefix}vocab.json", f"{prefix}merges.txt"
    make_tokenizer(folder, num_tokens)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / vocab).write_text(json.dumps(model["vocab"]))
    (folder / merges).write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    for path in folder.glob("*token*.json"):
        path.unlink()
    return vocab, merges


GRIDS = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)]  # tp, pp of the training ranks
MODEL = TinyGPT()


# Variants of Megatron-core that compute something else from the same tensors: a value, and what is supported.
OTHER_MODELS: dict[str, tuple[Any, str]] = {
    "rope_type": ("yarn", "rope"),
    "no_rope_freq": (4, "None"),
    "window_size": ([128, 0], "None, [-1, -1], [-1, 0]"),
    "softmax_type": ("off-by-one", "vanilla"),
    "softmax_scale": (0.5, "None"),
    "attention_output_gate": (True, "False"),
    "experimental_attention_variant": ("gdn", "None"),
    "multi_latent_attention": (True, "False"),
    "qk_l2_norm": (True, "False"),
    "glu_linear_offset": (1.0, "0.0"),
    "activation_func_clamp_value": (7.0, "None"),
    "use_mup": (True, "False"),
    "heterogeneous_layers_config_path": ("layers.json", "None"),
    "virtual_pipeline_model_parallel_size": (2, "1"),
}
