"""Train the small demo model: one text file in, one Hugging Face GPT-2 folder out.

    python models/train.py CORPUS_TXT OUTPUT_DIR [flags]

The corpus holds one paragraph a line and a line `<|endoftext|>` between books. The script owns the
split, the tokenizer, the training loop and the check of what it saved; it must not know the server:
nothing here imports from engine/, so the folder it writes is an ordinary checkpoint to every reader.

Axes: windows = stretches of consecutive tokens, positions = tokens of one window.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

END_OF_TEXT = "<|endoftext|>"
FINAL_RATE_FRACTION = 0.05  # where the cosine ends, as a share of the peak learning rate
MAX_FOLDER_BYTES = 16_000_000
MAX_RELOAD_DIFFERENCE = 0.01  # nats/token: fp16 storage and bf16 evaluation cost about a tenth of this
PROMPTS = ("Once upon a time", "The old house stood", '"Who are you?" said')
SAMPLE_LEN = 120
ODD_TEXT = f"  Don 't , tab\t\r\n\n\u00e9e\u0301\ufb01\u4f60\U0001f9d9\u200d\u2642\ufe0f\x00 {END_OF_TEXT} "


def setting(default: Any, text: str) -> Any:
    """A dataclass field that is also a command-line flag with this help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every choice of one run; each field is a flag of the same name."""

    layers: int = setting(8, "transformer layers")
    hidden: int = setting(256, "width of the residual stream")
    heads: int = setting(8, "attention heads a layer")
    positions: int = setting(512, "context length, also the training window, in tokens")
    vocab: int = setting(4096, f"tokenizer size, {END_OF_TEXT} included")
    dropout: float = setting(0.2, "probability, on embeddings, attention and residual branches")
    learning_rate: float = setting(1e-3, "peak of the schedule")
    warmup_steps: int = setting(200, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "AdamW's, on matrices and embeddings only")
    gradient_clip: float = setting(1.0, "largest gradient norm")
    batch_size: int = setting(32, "windows a step")
    max_epochs: int = setting(30, "passes over the training text; the cosine ends here")
    patience: int = setting(5, "stop after this many evaluations (one an epoch) without a new best")
    heldout_fraction: float = setting(0.1, "end of each book kept out of training, share of its characters")
    time_limit_s: float = setting(0.0, "seconds from the start after which training stops; 0: no limit")
    seed: int = setting(0, "of weights, window order, dropout and samples")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one")
    compile: bool = setting(False, "torch.compile the model: faster steps after a slow first one")

    def __post_init__(self) -> None:
        """Raise ValueError where a value cannot work."""
        for name in ("heldout_fraction", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("layers", "positions", "batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Evaluation:
    """One look at the held-out text."""

    step: int
    epoch: float
    train_loss: float  # nats/token, mean over the epoch, dropout on
    heldout_loss: float  # nats/token
    heldout_bits_per_byte: float
    tokens_per_s: int  # training only, evaluation not counted

    def __str__(self) -> str:
        """One line for the log."""
        return "  ".join(f"{name} {value:<7.6g}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class HeldOut:
    """The whole held-out text as windows that do not overlap; each token is predicted once."""

    inputs: Tensor  # [windows, positions]
    targets: Tensor  # [windows, positions], -100 after the last token
    num_tokens: int
    num_bytes: int


def parse_arguments() -> tuple[Path, Path, Settings]:
    """Read the command line: corpus file, output folder, settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="text file")
    parser.add_argument("output", type=Path, help="folder for the model")
    for item in fields(Settings):
        flag, text = "--" + item.name.replace("_", "-"), f"{item.metadata['help']} (default: {item.default})"
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=item.type, default=item.default, help=text)
    values = vars(parser.parse_args())
    corpus, output = values.pop("corpus"), values.pop("output")
    return corpus, output, Settings(**values)


def split_books(text: str, heldout_fraction: float) -> tuple[list[str], list[str]]:
    """Cut every book in two between paragraphs: its beginning for training, its end held out."""
    train, heldout = [], []
    for book in text.split(END_OF_TEXT):
        lines = [line + "\n" for line in book.splitlines() if line.strip()]
        wanted, cut = heldout_fraction * sum(map(len, lines)), len(lines)
        while cut > 0 and sum(map(len, lines[cut:])) < wanted:
            cut -= 1
        train.append("".join(lines[:cut]))
        heldout.append("".join(lines[cut:]))
    return [part for part in train if part], [part for part in heldout if part]


def train_tokenizer(books: list[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE laid out as GPT-2's: 256 bytes, merges, and `<|endoftext|>` as the last id."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all of them, or an unseen byte could not be encoded
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(books, trainer)
    learned = json.loads(learner.to_str())["model"]
    if len(learned["vocab"]) != vocab_size - 1:
        raise ValueError(f"text for {len(learned['vocab'])} tokens, not for {vocab_size - 1}")
    # The trainer would give a special token id 0; GPT-2 has it last, and in vocab.json.
    vocab = learned["vocab"] | {END_OF_TEXT: vocab_size - 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]]))
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output: Path, positions: int) -> None:
    """Write GPT-2's five files; not by transformers, whose own files differ between versions."""
    tokenizer.model.save(str(output))  # vocab.json, merges.txt
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = special | {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # it would change the text that comes back
        "errors": "replace",
        "model_max_length": positions,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def encode_books(tokenizer: Tokenizer, books: list[str], device: torch.device) -> Tensor:
    """All books as one tensor [tokens], `<|endoftext|>` after each."""
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for book in tokenizer.encode_batch(books) for token in (*book.ids, end_id)]
    return torch.tensor(ids, device=device)


def cut_heldout(tokens: Tensor, num_bytes: int, positions: int) -> HeldOut:
    """Lay the held-out tokens out as windows; `num_bytes` is the length of their text."""
    num_targets = len(tokens) - 1
    num_windows = math.ceil(num_targets / positions)
    padding = (0, num_windows * positions - num_targets)
    inputs = functional.pad(tokens[:-1], padding).view(num_windows, positions)
    targets = functional.pad(tokens[1:], padding, value=-100).view(num_windows, positions)
    return HeldOut(inputs, targets, num_targets, num_bytes)


def epoch_batches(tokens: Tensor, settings: Settings, order: torch.Generator) -> Iterator[list[Tensor]]:
    """Yield [inputs, targets], each [batch_size, positions], on the tokens' device.

    An epoch cuts the text at a fresh random offset and shuffles the windows: they start anywhere, yet
    every token is seen about once, which drawing each start by itself would not give.
    """
    positions, batch_size = settings.positions, settings.batch_size
    num_windows = (len(tokens) - positions) // positions  # fits whatever the offset
    offset = int(torch.randint(positions, (), generator=order))
    starts = offset + positions * torch.randperm(num_windows, generator=order).to(tokens.device)
    span = torch.arange(positions + 1, device=tokens.device)
    for first in range(0, num_windows - batch_size + 1, batch_size):
        windows = tokens[starts[first : first + batch_size, None] + span]
        yield [windows[:, :-1], windows[:, 1:]]


def build_model(settings: Settings, end_id: int, device: torch.device) -> GPT2LMHeadModel:
    """A GPT-2 (gelu_new, epsilon 1e-5, tied embeddings) with random weights and two faster equal parts."""
    # Without a mask function of its own, this name skips transformers' search for packed sequences, which
    # waits for the GPU in every step; with no mask, sdpa is causal.
    ALL_ATTENTION_FUNCTIONS.register("sdpa_without_mask", sdpa_attention_forward)
    config = GPT2Config(
        vocab_size=settings.vocab,
        n_positions=settings.positions,
        n_embd=settings.hidden,
        n_layer=settings.layers,
        n_head=settings.heads,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout),
        bos_token_id=end_id,
        eos_token_id=end_id,
        attn_implementation="sdpa_without_mask",
    )
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh")  # gelu_new in one kernel instead of eight
    return model.to(device)


def build_optimizer(model: GPT2LMHeadModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, not biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor, autocast: bool, reduction: str) -> Tensor:
    """Cross-entropy in nats over [windows, positions] tokens; targets of -100 do not count."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=inputs, use_cache=False).logits  # [windows, positions, vocab]
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def heldout_loss(model: nn.Module, heldout: HeldOut, batch_size: int, autocast: bool) -> float:
    """Nats a token over the whole held-out text."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=heldout.inputs.device)
    batches = zip(heldout.inputs.split(batch_size), heldout.targets.split(batch_size), strict=True)
    for inputs, targets in batches:
        total += token_loss(model, inputs, targets, autocast, "sum")
    model.train()
    return total.item() / heldout.num_tokens


def rate_fraction(step: int, warmup_steps: int, progress: float) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine over `progress` 0..1."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (FINAL_RATE_FRACTION + (1 - FINAL_RATE_FRACTION) * cosine)


def train(
    model: GPT2LMHeadModel, tokens: Tensor, heldout: HeldOut, settings: Settings, deadline: float
) -> list[Evaluation]:
    """Train until the epochs, the patience or the time are used up; leave the best weights in `model`.

    Returns one evaluation an epoch. `deadline` is a reading of time.monotonic(). Raises ValueError where
    the corpus is smaller than one batch, RuntimeError where no finite held-out loss was reached.
    """
    steps_per_epoch = (len(tokens) - settings.positions) // settings.positions // settings.batch_size
    if steps_per_epoch < 1:
        raise ValueError(f"{len(tokens)} tokens are fewer than one batch of {settings.batch_size} windows")
    runner = torch.compile(model) if settings.compile else model
    autocast = tokens.is_cuda
    optimizer = build_optimizer(model, settings)
    order = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same order on every device
    evaluations, best_loss, best_epoch, best_weights, step = [], math.inf, 0, None, 0
    began = time.monotonic()
    for epoch in range(1, settings.max_epochs + 1):
        loss_sum, first_step, epoch_began = torch.zeros((), device=tokens.device), step, time.monotonic()
        for inputs, targets in epoch_batches(tokens, settings, order):
            now = time.monotonic()
            if now >= deadline:
                break
            # A cosine cut off half-way wastes the run, so time that runs short ends it as epochs do.
            progress = max(step / (settings.max_epochs * steps_per_epoch), (now - began) / (deadline - began))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_fraction(step, settings.warmup_steps, progress)
            loss = token_loss(runner, inputs, targets, autocast, "mean")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
        if step == first_step:
            break
        train_loss = loss_sum.item() / (step - first_step)
        speed = (step - first_step) * inputs.numel() / (time.monotonic() - epoch_began)
        loss = heldout_loss(runner, heldout, settings.batch_size, autocast)
        bits = loss * heldout.num_tokens / math.log(2) / heldout.num_bytes
        evaluations.append(Evaluation(step, step / steps_per_epoch, train_loss, loss, bits, round(speed)))
        print(evaluations[-1], flush=True)
        if loss < best_loss:
            best_loss, best_epoch = loss, epoch
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch - best_epoch >= settings.patience:
            break
    if best_weights is None:
        raise RuntimeError(f"no finite held-out loss after {step} steps: {evaluations}")
    model.load_state_dict(best_weights)
    return evaluations


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, books: list[str], heldout: HeldOut) -> None:
    """Assert that the reloaded tokenizer loses no text and gives the ids that were evaluated."""
    for text in (*books, ODD_TEXT):
        assert tokenizer.decode(tokenizer(text).input_ids) == text, f"changed: {text[:60]!r}"
    ids = [token for book in tokenizer(books).input_ids for token in (*book, tokenizer.eos_token_id)]
    assert ids[1:] == heldout.targets.flatten()[: heldout.num_tokens].tolist(), "other ids than in memory"


def print_samples(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Continue each prompt, for a human to judge."""
    torch.manual_seed(seed)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        room = model.config.n_positions - inputs.input_ids.shape[1]
        options = {"do_sample": True, "top_k": 40, "temperature": 0.8, "pad_token_id": tokenizer.eos_token_id}
        output = model.generate(**inputs, **options, max_new_tokens=min(SAMPLE_LEN, room))
        print(f"\n{tokenizer.decode(output[0], skip_special_tokens=True)}")


def main() -> None:
    """Run the whole way from text to checked folder, then print one line of JSON."""
    started = time.monotonic()
    corpus, output, settings = parse_arguments()
    output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if settings.device == "auto" else settings.device)

    train_books, heldout_books = split_books(corpus.read_text(encoding="utf-8"), settings.heldout_fraction)
    tokenizer = train_tokenizer(train_books, settings.vocab)
    tokens = encode_books(tokenizer, train_books, device)
    heldout_bytes = sum(len(book.encode()) for book in heldout_books)
    heldout = cut_heldout(encode_books(tokenizer, heldout_books, device), heldout_bytes, settings.positions)
    model = build_model(settings, tokenizer.token_to_id(END_OF_TEXT), device)
    print(f"{len(tokens)} tokens to train on, {heldout.num_tokens} held out", flush=True)

    deadline = started + settings.time_limit_s if settings.time_limit_s else math.inf
    evaluations = train(model, tokens, heldout, settings, deadline)
    best = min(evaluations, key=lambda evaluation: evaluation.heldout_loss)
    model.half().save_pretrained(output)
    save_tokenizer(tokenizer, output, settings.positions)
    # From here on what is on disk speaks, loaded as a user would and without a network.
    saved_tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    check_tokenizer(saved_tokenizer, heldout_books, heldout)
    model = GPT2LMHeadModel.from_pretrained(output, dtype=torch.float32, local_files_only=True).to(device)
    loss = heldout_loss(model, heldout, settings.batch_size, autocast=False)
    difference = abs(loss - best.heldout_loss)
    assert difference <= MAX_RELOAD_DIFFERENCE, f"{loss} on disk, {best.heldout_loss} in memory"
    paths = [path for path in output.iterdir() if path.is_file()]
    for path in paths:
        path.chmod(0o644)  # safetensors files are born readable by their owner only
    num_bytes = sum(path.stat().st_size for path in paths)
    assert num_bytes <= MAX_FOLDER_BYTES, f"{output} holds {num_bytes} bytes, more than {MAX_FOLDER_BYTES}"
    print_samples(model.eval(), saved_tokenizer, settings.seed)

    result = {
        "reloaded_heldout_loss": loss,
        "parameters": model.num_parameters(),
        "train_tokens": len(tokens),
        "heldout_tokens": heldout.num_tokens,
        "heldout_bytes": heldout.num_bytes,
        "hardware": torch.cuda.get_device_name() if tokens.is_cuda else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "wall_s": round(time.monotonic() - started, 1),
        "last_epoch": evaluations[-1].epoch,
        "evaluations": [asdict(evaluation) for evaluation in evaluations],
    }
    print(f"\n{json.dumps(asdict(settings) | asdict(best) | result)}")


if __name__ == "__main__":
    main()
