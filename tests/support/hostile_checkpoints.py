"""Checkpoints made to hang, to fill the memory, to run code or to spoil an error's sentence: a table of edits.

An Attack's `make` writes the checkpoint into a folder and gives the function that must fail.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  (before the forks)
from safetensors.torch import load_file

import convert
from serving.chat import ChatTemplate
from serving.load_tokenizer import load_tokenizer
from tests.support.broken import EVIL_TRACE, Edit, Evil, edit_config, edit_state, settings
from tests.support.checkpoints import make_gpt2
from tests.support.distributed_checkpoints import edit_metadata, write_nemo_distributed
from tests.support.nemo_checkpoints import MODEL, write_nemo

_WEIGHTS, _BIN, _YAML, _CKPT = "model.safetensors", "pytorch_model.bin", "model_config.yaml", "m-last.ckpt"
_FC1 = "model.decoder.layers.mlp.linear_fc1.weight"
_LAYERS = "model.language_model.encoder.layers"
_LONG, _DEEP = "x" * 10**6, "[" * 10**6


@dataclass(frozen=True)
class Attack:
    """make: see above; part: of the sentence; slow: its reason, "" for none."""

    make: Callable[[Path], Callable[[], Any]]
    part: str
    slow: str = ""


def prepare(folder: Path) -> None:
    """The checkpoint that attacks on Hugging Face's folders start from."""
    make_gpt2(folder / "source", layers=1, hidden=16, heads=2, vocab_size=303, n_positions=32)


# --- edits ---


def hf(part: str, *edits: Edit, slow: str = "") -> Attack:
    """A Hugging Face folder that is converted."""

    def make(folder: Path) -> Callable[[], Any]:
        shutil.copytree(folder.parent / "source", folder / "hf")
        for edit in edits:
            edit(folder / "hf")
        return lambda: convert.convert(folder / "hf", folder / "out", 1, "fp32")

    return Attack(make, part, slow)


def served(part: str, *edits: Edit, slow: str = "") -> Attack:
    """A tokenizer that a server reads at its start."""

    def make(folder: Path) -> Callable[[], Any]:
        shutil.copytree(folder.parent / "source", folder / "hf")
        for edit in edits:
            edit(folder / "hf")
        return lambda: ChatTemplate(load_tokenizer(folder / "hf")).check("")

    return Attack(make, part, slow)


def nemo(part: str, edit: Edit = lambda folder: None, slow: str = "", **values: Any) -> Attack:
    """A NeMo folder that is converted."""

    def make(folder: Path) -> Callable[[], Any]:
        write_nemo(folder / "m", MODEL, packed="", edit=edit, **values)
        return lambda: convert.convert(folder / "m", folder / "out", 1, "fp32")

    return Attack(make, part, slow)


def distributed(part: str, edit: Edit, slow: str = "") -> Attack:
    """A NeMo folder with a distributed checkpoint."""

    def make(folder: Path) -> Callable[[], Any]:
        write_nemo_distributed(folder / "m", MODEL, "torch_dist", packed="", edit=edit)
        return lambda: convert.convert(folder / "m", folder / "out", 1, "fp32")

    return Attack(make, part, slow)


def raw(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def long(name: str, size: int) -> Edit:
    """A file of zeros that takes no room on the disk."""

    def act(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return act


def number(key: str, text: str) -> Edit:
    """config.json with a value that json.dumps does not write."""

    def act(folder: Path) -> None:
        edit_config(folder, **{key: "@"})
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"@"', text))

    return act


def in_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def act(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        (folder / name).write_text(json.dumps(values))

    return act


def tokenizer(**values: Any) -> Edit:
    return in_json("tokenizer.json", lambda found: found.update(values))


def tokenizer_config(**values: Any) -> Edit:
    return in_json("tokenizer_config.json", lambda found: found.update(values))


def yaml_lines(text: str | bytes, *without: str) -> Edit:
    """Lines before model_config.yaml's own, of which those of some keys go."""

    def act(folder: Path) -> None:
        path = folder / _YAML
        own = [line for line in path.read_text().splitlines() if line.partition(":")[0] not in without]
        path.write_bytes(text if isinstance(text, bytes) else "\n".join([text, *own]).encode())

    return act


def packed(pickle: bytes, name: str = _BIN) -> Edit:
    """A file of torch.save with this pickle, in place of the weights."""

    def act(folder: Path) -> None:
        for old in (_WEIGHTS, _YAML, "model_weights.ckpt"):
            (folder / old).unlink(missing_ok=True)
        with zipfile.ZipFile(folder / name, "w") as archive:
            for record, content in (("data.pkl", pickle), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"archive/{record}", content)

    return act


def many_records(count: int) -> Edit:
    """pytorch_model.bin whose zip archive lists as many empty records; 46 bytes each."""

    def act(folder: Path) -> None:
        (folder / _WEIGHTS).unlink()
        listed = (b"PK\1\2" + bytes(42)) * count
        size, first = len(listed), 4
        end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, first)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, first + size, 1)
        end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
        (folder / _BIN).write_bytes(b"PK\3\4" + listed + end64 + locator + end)

    return act


def split_at(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def large_pickle(method: int) -> Edit:
    """pytorch_model.bin whose data.pkl has 3 GB of zeros: 3 MB if it is compressed."""

    def act(folder: Path) -> None:
        (folder / _WEIGHTS).unlink()
        with zipfile.ZipFile(folder / _BIN, "w", method) as archive:
            with archive.open("archive/data.pkl", "w", force_zip64=True) as record:
                for _ in range(3 << 6):
                    record.write(bytes(1 << 24))

    return act


def lightning(content: Any) -> Edit:
    def act(folder: Path) -> None:
        (folder / _YAML).unlink()
        (folder / "model_weights.ckpt").unlink()
        torch.save(content, folder / _CKPT)

    return act


def in_bin(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def act(folder: Path) -> None:
        tensors = load_file(folder / _WEIGHTS)
        (folder / _WEIGHTS).unlink()
        edit(tensors)
        torch.save(tensors, folder / _BIN)

    return act


def header(text: str) -> Edit:
    return raw(_WEIGHTS, struct.pack("<Q", len(text)) + text.encode() + bytes(64))


def shards(weight_map: dict[str, str]) -> Edit:
    def act(folder: Path) -> None:
        (folder / _WEIGHTS).rename(folder / "a.safetensors")
        (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return act


def metadata(pickle: bytes) -> Edit:
    return raw(".metadata", pickle)


def link(folder: Path) -> None:
    """The output's folder is a link to nowhere."""
    (folder.parent / "out").mkdir()
    (folder.parent / "out/1-gpu").symlink_to(folder.parent / "nowhere")


def link_to_folder(folder: Path) -> None:
    (folder.parent / "out").mkdir()
    (folder.parent / "other").mkdir()
    (folder.parent / "out/1-gpu").symlink_to(folder.parent / "other")


def stretched(tensors: dict[str, Any]) -> None:
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(1, 16).expand(10**9, 16)


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    """A piece of a sentencepiece model."""
    body = b"\x0a" + varint(len(text)) + text.encode() + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
    return b"\x0a" + varint(len(body)) + body


def sentencepiece(part: str, data: bytes, slow: str = "") -> Attack:
    values = {"tokenizer": {"library": "sentencepiece", "model": "nemo:t.model"}}
    return nemo(part, raw("t.model", data), slow, **values)


# A dict whose key is a tuple that holds another one twice, and so on 60 times: 2^60 steps to hash it.
_TWICE = (b"0h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))
HASH_BOMB = b"\x80\2})q\0" + b"".join(_TWICE) + b"K\1s."
MEMO_BOMB = b"\x80\x02}r\xff\xff\xff\x7f."  # puts the object at place 2^31 of a list
LAUGHS = "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
FEW_LAUGHS = "\n".join(LAUGHS.splitlines()[:4]) + "\n"  # 2000 values, which are within the limit
MERGES = "m0: &m0 {k0: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{','.join([f'*m{n - 1}'] * 10)}], k{n}: 1}}\n" for n in range(1, 12)
)
SHARED: dict[str, Any] = {"x": 1}
for _ in range(40):
    SHARED = {"a": SHARED, "b": SHARED}
CYCLIC: dict[str, Any] = {}
CYCLIC["hyper_parameters"] = CYCLIC
SPIN = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
GROWTH = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}

ATTACKS = {
    "config: 10^7 layers": hf("/hf/config.json: num_layer is 10000000; it must be at most", settings(n_layer=10**7)),
    "config: 10^12 layers": hf("num_layer is 1000000000000; it must be at most 10000", settings(n_layer=10**12)),
    "config: 10^400 layers": hf("it must be at most 10000", number("n_layer", "1" + "0" * 400)),
    "config: 5000 digits": hf("/hf/config.json: not a JSON file", number("n_layer", "1" * 5000)),
    "config: NaN layers": hf("n_layer is nan", number("n_layer", "NaN")),
    "config: infinite layers": hf("n_layer is inf", number("n_layer", "1e999")),
    "config: negative layers": hf("n_layer is -5", settings(n_layer=-5)),
    "config: long text for layers": hf("it must be a whole number of at least 1", settings(n_layer=_LONG)),
    "config: deep layers": hf("/hf/config.json: not a JSON file", number("n_layer", _DEEP)),
    "config: 10^30 wide": hf("must be at most 2147483647", settings(n_embd=10**30)),
    "config: 10^15 tokens": hf("must be at most 2147483647", settings(vocab_size=10**15)),
    "config: 10^9 heads": hf("head_num is 1000000000", settings(n_head=10**9, n_embd=10**9)),
    "config: list of architectures": hf("architecture [] is not supported", settings(model_type=[])),
    "config: long architecture": hf("is not supported; supported: bloom", settings(model_type=_LONG)),
    "config: list of activations": hf("activation_function [[]] is not", settings(activation_function=[[]])),
    "config: long activation": hf("is not supported; supported: gelu", settings(activation_function=_LONG)),
    "config: long epsilon": hf("it must lie between 0 and 1", settings(layer_norm_epsilon=_LONG)),
    "config: NaN epsilon": hf("it must lie between 0 and 1", number("layer_norm_epsilon", "NaN")),
    "config: long switch": hf("only True is supported", settings(scale_attn_weights=_LONG)),
    "config: long begin token": hf("one of the 303 token ids", settings(bos_token_id=_LONG)),
    "config: deep": hf("/hf/config.json: not a JSON file", raw("config.json", _DEEP)),
    "config: 2 GB": hf("/hf/config.json: 2,147,483,648 bytes; such a file", long("config.json", 2 << 30)),
    "generation config: deep": hf("not a JSON file", raw("generation_config.json", _DEEP)),
    "generation config: 10^6 end tokens": hf(
        "token ids", raw("generation_config.json", json.dumps({"eos_token_id": [500] * 10**6}))
    ),
    "tokenizer.json: 20 GB": hf("/hf/tokenizer.json: 21,474,836,480 bytes", long("tokenizer.json", 20 << 30)),
    "merges.txt: 20 GB": hf("/hf/merges.txt: 21,474,836,480 bytes", long("merges.txt", 20 << 30)),
    "output: link to nowhere": hf("/out/1-gpu: a link or a file", link),
    "output: link to a folder": hf("/out/1-gpu: a link or a file", link_to_folder),
    "bin: 3 GB of pickle, compressed": hf("is compressed", large_pickle(zipfile.ZIP_DEFLATED), slow="10 s to make"),
    "bin: 3 GB of pickle": hf("3,221,225,472 bytes", large_pickle(zipfile.ZIP_STORED), slow="3 GB on the disk"),
    "bin: a million records": hf("list of records has 46,000,000 bytes", many_records(1_000_000)),
    "bin: hash bomb": hf("a tuple of more than 100,000 elements", packed(HASH_BOMB)),
    "bin: hash bomb of old": hf(
        "a tuple of more than 100,000", lambda folder: (folder / _WEIGHTS).unlink(), raw(_BIN, HASH_BOMB)
    ),
    "bin: millions of marks": hf("more than 2,000,000 operations", packed(b"\x80\2" + b"(" * 2 * 10**6 + b"t" * 10**6)),
    "bin: stretched tensor": hf("the file holds fewer elements", in_bin(stretched), settings(vocab_size=10**9)),
    "bin: sparse tensor": hf(
        "is no plain tensor", in_bin(lambda t: t.update({"transformer.wte.weight": torch.eye(303).to_sparse()}))
    ),
    "bin: meta tensor": hf(
        "is no plain tensor", in_bin(lambda t: t.update({"lm_head.weight": torch.empty(303, 16, device="meta")}))
    ),
    "bin: code": hf("refused, because its pickle asks for", in_bin(lambda t: t.update(a=Evil()))),
    "safetensors: deep": hf("not a complete safetensors file", header('{"a":' + _DEEP)),
    "safetensors: overflow": hf(
        "not a complete", header(json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}}))
    ),
    "safetensors: name of 50 MB": hf(
        "has none such",
        header(json.dumps({"x" * (50 << 20): {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}})),
    ),
    "index: long name": hf("a file of the same folder is expected", shards({_LONG: "../a"})),
    "index: long shard": hf("File name too long", shards({"x": _LONG})),
    "yaml: 10^29 aliases": nemo("the settings have more than 100,000 values", yaml_lines(LAUGHS)),
    "yaml: merges": nemo("more than 100,000 values", yaml_lines(MERGES)),
    "yaml: in itself": nemo("a setting holds itself", yaml_lines("a: &a [*a]")),
    "yaml: long alias": nemo(f"/m/{_YAML}: not a YAML file", yaml_lines("a: *" + "x" * 100_000)),
    "yaml: 300 KB": nemo("a file of settings has 262,144 at most", yaml_lines("a: *" + "x" * 300_000)),
    "yaml: deep": nemo("not a YAML file", yaml_lines("a: " + "[" * 100_000)),
    "yaml: date": nemo(f"/m/{_YAML}: not a YAML file (month", yaml_lines("a: 2020-99-99")),
    "yaml: digits": nemo("not a YAML file", yaml_lines("num_layers: " + "9" * 10_000, "num_layers")),
    "yaml: code": nemo("not a YAML file", yaml_lines(f"a: !!python/object/apply:os.system [touch {EVIL_TRACE}]")),
    "yaml: no text": nemo("not a YAML file", yaml_lines(b"\xff\xfe\0")),
    **{
        f"yaml: aliases for {key}": nemo(f"{key} is [[[", yaml_lines(f"{FEW_LAUGHS}{key}: *a3", key))
        for key in ("num_layers", "hidden_size", "bias", "normalization", "layernorm_epsilon")
    },
    "nemo: 10^12 layers": nemo("num_layer is 1000000000000", num_layers=10**12),
    "nemo: 10^9 ranks": nemo("tensor_model_parallel_size is 1000000000", tensor_model_parallel_size=10**9),
    "nemo: long tokenizer": nemo("names another", tokenizer={"library": "sentencepiece", "model": "x" * 100_000}),
    "nemo: layer of 5000 digits": nemo(
        "no part of", edit_state(lambda state: state.update({f"{_LAYERS}.{'9' * 5000}.mlp.weight": torch.ones(8)}))
    ),
    "nemo: long name": nemo("no part of", edit_state(lambda state: state.update({_LONG: torch.ones(8)}))),
    "lightning: cyclic": nemo("nested without end", lightning(CYCLIC)),
    "lightning: 2^40 values": nemo("more than 100,000 values", lightning({"hyper_parameters": SHARED})),
    "lightning: hash bomb": nemo("a tuple of more than 100,000", packed(HASH_BOMB, _CKPT)),
    "lightning: cut off": nemo("not a complete PyTorch file", packed(b"\x80\2}", _CKPT)),
    "metadata: hash bomb": distributed("a tuple of more than 100,000", metadata(HASH_BOMB)),
    "metadata: memo bomb": distributed("not the metadata of a checkpoint", metadata(MEMO_BOMB)),
    "metadata: 20 GB": distributed("21,474,836,480 bytes", long(".metadata", 20 << 30)),
    "metadata: millions of marks": distributed(
        "more than 2,000,000 operations", metadata(b"\x80\2" + b"(" * 3 * 10**6)
    ),
    "metadata: long text": distributed("not a readable", metadata(b"\x80\4\x8d" + struct.pack("<Q", 1 << 40) + b".")),
    "metadata: code": distributed("asks for os.system", metadata(b"cos\nsystem\n.")),
    "metadata: long code": distributed("checkpoint's metadata only", metadata(b"c" + _LONG.encode() + b"\ny\n.")),
    "metadata: 10^12 layers": distributed(
        "do not make up its shape",
        edit_metadata(lambda m: setattr(m.state_dict_metadata[_FC1], "size", torch.Size([10**12, 8, 8]))),
    ),
    "metadata: long key": distributed(
        "is in no file", edit_metadata(lambda m: m.state_dict_metadata.update({_LONG: m.state_dict_metadata[_FC1]}))
    ),
    "sentencepiece: number without end": sentencepiece("not a sentencepiece model", b"\x08" + b"\xff" * 10**6 + b"\1"),
    "sentencepiece: 500 000 pieces": sentencepiece(
        "500,001 pieces", b"".join(piece(f"p{n}") for n in range(500_000)) + piece("<unk>", 0, 2), "3 s"
    ),
    "sentencepiece: long pieces": sentencepiece("characters in a piece", piece("ab" * 20_000) + piece("<unk>", 0, 2)),
    "sentencepiece: NaN": sentencepiece("a score that is no number", piece("a", float("nan")) + piece("<unk>", 0, 2)),
    "sentencepiece: rules": sentencepiece(
        "broken rules", piece("a") + piece("<unk>", 0, 2) + b"\x1a\x0a\x12\x08" + b"\xff\xff\xff\x7f" * 2
    ),
    "server: tokenizer cut off": served("no tokenizer", lambda folder: os.truncate(folder / "tokenizer.json", 500)),
    "server: deep tokenizer": served("no tokenizer", raw("tokenizer.json", _DEEP)),
    "server: 3 GB of tokenizer": served("3,221,225,472 bytes", long("tokenizer.json", 3 << 30)),
    "server: 3 GB of settings": served("3,221,225,472 bytes", long("tokenizer_config.json", 3 << 30)),
    "server: a letter becomes 10^18": served(
        "takes more than 5 s or 1 GiB", tokenizer(normalizer={"type": "Sequence", "normalizers": [GROWTH] * 6})
    ),
    "server: a pattern slow in the length": served(
        "its patterns take more than 1 s", tokenizer(pre_tokenizer=split_at("[ab]*[cd]|."))
    ),
    "server: a pattern slow in 2^length": served("no tokenizer", tokenizer(pre_tokenizer=split_at("(☃+)+[bc]|."))),
    "server: a pattern slow for a kind of letters": served(
        "its patterns take more than 1 s", tokenizer(pre_tokenizer=split_at(r"\p{So}*\p{So}*[bc]|."))
    ),
    "server: slow spaces": served(
        "its patterns take more than 1 s",
        tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": r"\s*[b☃]"}, "content": "b"}),
    ),
    "server: broken pattern": served(
        "no tokenizer", tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "(" * 50_000}, "content": "b"})
    ),
    "server: negative ids": served(
        "no tokenizer", in_json("tokenizer.json", lambda t: t["model"]["vocab"].update(a=-1))
    ),
    "server: unknown model": served("no tokenizer", tokenizer(model={"type": _LONG})),
    "server: NaN in a unigram": served(
        "no tokenizer", tokenizer(model={"type": "Unigram", "unk_id": 10**12, "vocab": [["a", float("nan")]]})
    ),
    "server: number for a class": served("no tokenizer", tokenizer_config(tokenizer_class=5)),
    "server: text for added tokens": served("no tokenizer", tokenizer_config(added_tokens_decoder="x")),
    "server: deep settings": served("no tokenizer", raw("tokenizer_config.json", _DEEP)),
    "server: deep special tokens": served("no tokenizer", raw("special_tokens_map.json", _DEEP)),
    "server: text for a length": served("no tokenizer", tokenizer_config(model_max_length="x")),
    "server: template without end": served("more than 2 s", tokenizer_config(chat_template=SPIN), slow="3 s"),
    "server: template of 10 GB": served("more than", tokenizer_config(chat_template="{{ 'a' * 10**10 }}")),
}
