"""The stand-in for FasterTransformer's op (tests/support/standin) against Hugging Face, on a tiny random GPT-2."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.multi.standin_parity import expect
from tests.support import tiny_gpt2 as tiny
from tests.support.launch import ROOT
from tests.support.ranks import call_ranks
from tests.support.standin import StandinUnavailable, build_standin

PROMPTS, OUTPUT_LEN = tiny.PROMPTS, tiny.OUTPUT_LEN


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return build_standin(ROOT / "build" / "standin")
    except StandinUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def loaded(library: Path) -> None:
    from mpi4py import MPI

    assert MPI.Is_initialized()
    torch.classes.load_library(str(library))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_gpt2()


@pytest.fixture(scope="module")
def op(model: Any) -> Any:
    return tiny.make_op(weights_of(model))


def weights_of(model: Any) -> list[torch.Tensor]:
    return tiny.shard({name: tensor.float().numpy() for name, tensor in model.state_dict().items()})


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def last_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


def greedy(op: Any, prompts: list[list[int]] = PROMPTS, **params: Any) -> list[list[int]]:
    outputs = tiny.run(op, prompts, OUTPUT_LEN, **params)
    return [row for [row] in tiny.new_tokens(outputs, prompts)]


def expected_greedy(model: Any, **options: Any) -> list[list[int]]:
    return [tiny.hf_tokens(model, prompt, OUTPUT_LEN, **options)[0] for prompt in PROMPTS]


def test_greedy_tokens_of_prompts_of_mixed_lengths(model: Any, op: Any) -> None:
    expected = expected_greedy(model)
    assert greedy(op) == expected
    assert len({token for row in expected for token in row}) > 5  # a text that is all one token proves little
    assert greedy(op, top_k=ints(1, 1, 1, 1)) == expected
    assert [greedy(op, [prompt])[0] for prompt in PROMPTS] == expected


def test_relu_and_a_separate_lm_head() -> None:
    model = tiny.tiny_gpt2(activation_function="relu", tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    expected = expected_greedy(model)
    end_id = next(i for i in range(tiny.VOCAB) if all(i not in row for row in expected))
    assert greedy(tiny.make_op(weights_of(model), activation_type="relu", end_id=end_id)) == expected


def test_layernorm_before_the_layers_and_none_behind() -> None:
    model = tiny.tiny_gpt2()
    model.transformer.drop = model.transformer.ln_f
    model.transformer.ln_f = torch.nn.Identity()
    flags = dict(has_pre_decoder_layernorm=True, has_post_decoder_layernorm=False)
    assert greedy(tiny.make_op(weights_of(model), **flags)) == expected_greedy(model)


def test_no_positions() -> None:
    model = tiny.tiny_gpt2()
    weights = weights_of(model)
    model.transformer.wpe.weight.data.zero_()
    del weights[12 * tiny.LAYERS + 2]
    assert greedy(tiny.make_op(weights, has_positional_encoding=False)) == expected_greedy(model)


def test_bfloat16_weights_and_the_file_shape_of_qkv() -> None:
    model = tiny.tiny_gpt2()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    weights = [weight.bfloat16() for weight in weights_of(model)]
    for i in range(2 * tiny.LAYERS, 3 * tiny.LAYERS):
        weights[i] = weights[i].view(tiny.HIDDEN, 3, tiny.HIDDEN)
        weights[i + tiny.LAYERS] = weights[i + tiny.LAYERS].view(3, tiny.HIDDEN)
    assert greedy(tiny.make_op(weights)) == expected_greedy(model)


def test_quantization_of_columns() -> None:
    weight = torch.tensor([[1.0, 0.0, -8.0], [-0.25, 0.0, 3.96875]])
    int8, scale = torch.ops.fastertransformer.symmetric_quantize_last_axis_of_batched_matrix(weight, torch.int8)
    assert scale.tolist() == [1 / 128, 0, 8 / 128]
    assert int8.tolist() == [[127, 0, -128], [-32, 0, 64]]  # 128 is clipped; 63.5 rounds away from zero
    int8, scale = torch.ops.fastertransformer.symmetric_quantize_last_axis_of_batched_matrix(
        weight.half().expand(5, 2, 3).contiguous(), torch.int8
    )
    assert (int8.shape, scale.shape, scale.dtype) == ((5, 2, 3), (5, 3), torch.float16)


def test_int8_weights() -> None:
    layers = tiny.LAYERS
    weights, int8, scale = [weight.bfloat16() for weight in weights_of(tiny.tiny_gpt2())], [], []
    dequantized = list(weights)
    for kind in (2, 4, 8, 10):
        for i in range(kind * layers, (kind + 1) * layers):
            quantize = torch.ops.fastertransformer.symmetric_quantize_last_axis_of_batched_matrix
            one_int8, one_scale = quantize(weights[i], torch.int8)
            int8.append(one_int8)
            scale.append(one_scale)
            dequantized[i] = one_int8.float() * one_scale.float()
            weights[i] = torch.empty(0, dtype=torch.bfloat16)
    quantized = tiny.make_op(weights, int8_mode=1, int8_weights=int8, scale=scale)
    expected = tiny.make_op([weight.float() for weight in dequantized])
    runs = [tiny.run(each, PROMPTS, OUTPUT_LEN, log_probs=1) for each in (quantized, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))

    with pytest.raises(RuntimeError, match=r"stand-in: int8_weights has 0 tensors, expected 8"):
        tiny.make_op(weights, int8_mode=1)
    with pytest.raises(RuntimeError, match=r"scale\[2\] \(layer 0 attention.dense.weight\): expected shape \[32\]"):
        tiny.make_op(weights, int8_mode=1, int8_weights=int8, scale=scale[:2] + scale[4:6] + scale[4:])


def test_end_id_stops_a_row_and_counts(model: Any) -> None:
    free = expected_greedy(model)
    end_id = free[0][4]
    op = tiny.make_op(weights_of(model), end_id=end_id)
    ids, lengths = tiny.run(op, PROMPTS, OUTPUT_LEN)
    longest = max(map(len, PROMPTS))
    total_len = longest + OUTPUT_LEN
    stopped_early = 0
    for prompt, row, [got], [length] in zip(PROMPTS, free, ids.tolist(), lengths.tolist(), strict=True):
        new = row[: row.index(end_id) + 1] if end_id in row else row
        stopped_early += len(new) < OUTPUT_LEN
        assert got == prompt + new + [end_id] * (total_len - len(prompt) - len(new))
        assert length == longest + len(new)  # counted from the longest prompt, with end_id
    assert 0 < stopped_early < len(PROMPTS)


def test_min_length_and_repetition_penalty_and_temperature(model: Any) -> None:
    penalized = expected_greedy(model, repetition_penalty=1.5)
    assert penalized != expected_greedy(model)
    op = tiny.make_op(weights_of(model))
    # The real op applies no penalty at step 1, which only a batch of one-token prompts sees.
    assert greedy(op, repetition_penalty=floats(1.5), temperature=floats(0.5)) == penalized

    end_id = expected_greedy(model)[0][0]
    op = tiny.make_op(weights_of(model), end_id=end_id)
    assert greedy(op)[0] == [end_id]
    held_off = greedy(op, min_length=ints(3, 0, 0, 0))
    assert end_id not in held_off[0][:3] and len(held_off[0]) >= 3
    assert held_off[1:] == greedy(op)[1:]


def test_presence_penalty_falls_once_on_each_token_seen(model: Any, op: Any) -> None:
    prompt = [44, 94, 94, 29, 37, 58]
    logits = last_logits(model, prompt)
    logits[sorted(set(prompt))] -= 4
    outputs = tiny.run(op, [prompt, [1]], 1, presence_penalty=floats(4, 0), log_probs=1)
    assert tiny.new_tokens(outputs, [prompt, [1]])[0] == [[int(logits.argmax())]]
    np.testing.assert_allclose(outputs[2][0], logits.log_softmax(-1).max(), rtol=1e-4)


def test_bad_words(model: Any, op: Any) -> None:
    prompt = PROMPTS[2]
    [free] = tiny.hf_tokens(model, prompt, OUTPUT_LEN)
    words = [[free[0]], [prompt[-1], 5], [free[1], free[2]]]
    tokens = [token for word in words for token in word]
    ends = list(np.cumsum([len(word) for word in words]))
    bad = torch.tensor([[tokens, ends + [-1] * (len(tokens) - len(ends))]], dtype=torch.int32)
    expected = tiny.hf_tokens(model, prompt, OUTPUT_LEN, bad_words_ids=words)
    assert expected != [free]
    assert greedy(op, [prompt], bad_words_list=bad) == expected


def test_cum_log_probs(model: Any, op: Any) -> None:
    for mode in (1, 2):
        outputs = tiny.run(op, PROMPTS, OUTPUT_LEN, log_probs=mode)
        for prompt, [new], [log_prob] in zip(
            PROMPTS, tiny.new_tokens(outputs, PROMPTS), outputs[2].tolist(), strict=True
        ):
            expected = tiny.hf_log_prob(model, prompt + new, len(prompt) if mode == 1 else 1)
            assert log_prob == pytest.approx(expected, rel=1e-4)
    assert len(tiny.run(op, PROMPTS, OUTPUT_LEN)) == 2


def test_beams(model: Any, op: Any) -> None:
    ids, lengths, log_probs = outputs = tiny.run(op, PROMPTS, OUTPUT_LEN, beam_width=4, log_probs=1)
    assert ids.shape == (4, 4, 7 + OUTPUT_LEN) and lengths.shape == log_probs.shape == (4, 4)
    options = dict(num_beams=4, num_return_sequences=4, length_penalty=0.0)
    for prompt, beams, scores in zip(PROMPTS, tiny.new_tokens(outputs, PROMPTS), log_probs.tolist(), strict=True):
        assert beams == tiny.hf_tokens(model, prompt, OUTPUT_LEN, **options)
        expected = [tiny.hf_log_prob(model, prompt + new, len(prompt)) for new in beams]
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_a_finished_beam_keeps_its_score(model: Any) -> None:
    op = tiny.make_op(weights_of(model), end_id=expected_greedy(model)[1][2])
    outputs = tiny.run(op, PROMPTS, OUTPUT_LEN, beam_width=3, log_probs=1)
    new = tiny.new_tokens(outputs, PROMPTS)
    assert any(len(beam) < OUTPUT_LEN for row in new for beam in row)
    for prompt, beams, scores in zip(PROMPTS, new, outputs[2].tolist(), strict=True):
        assert scores == sorted(scores, reverse=True)
        expected = [tiny.hf_log_prob(model, prompt + beam, len(prompt)) for beam in beams]
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def plain_beams(
    model: Any, prompt: list[int], end_id: int, temperature: float, len_penalty: float, diversity: float
) -> list[tuple[list[int], float]]:
    """[beam] -> tokens, score: beam search of width 3 in numpy, the op's length: prompt and padding too."""
    width, max_input_len = 3, max(map(len, PROMPTS))
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(OUTPUT_LEN):
        found = []
        for tokens, total in beams:
            if tokens[-1:] == [end_id]:
                found.append((total / (max_input_len - 1 + len(tokens)) ** len_penalty, tokens, total))
                continue
            log_probs = (last_logits(model, prompt + tokens) / temperature).log_softmax(-1).double().numpy()
            for place, token in enumerate(np.argsort(-log_probs)[: 2 * width]):
                score = (total + log_probs[token]) / (max_input_len + len(tokens)) ** len_penalty
                found.append((score + diversity * (place % width), [*tokens, int(token)], total + log_probs[token]))
        beams = [(tokens, total) for _, tokens, total in sorted(found, key=lambda one: -one[0])[:width]]
    return beams


@pytest.mark.parametrize(
    ("temperature", "len_penalty", "diversity"), [(1, 0, 0), (0.6, 0, 0), (1, 4, 0), (1, -3, 0), (1, 0, -0.7)]
)
def test_parameters_of_beams(model: Any, temperature: float, len_penalty: float, diversity: float) -> None:
    end_id = expected_greedy(model)[1][2]
    op = tiny.make_op(weights_of(model), end_id=end_id)
    given = dict(beam_search_diversity_rate=floats(diversity), len_penalty=floats(len_penalty))
    outputs = tiny.run(
        op, PROMPTS, OUTPUT_LEN, beam_width=3, log_probs=1, temperature=floats(*[temperature] * 4), **given
    )
    new, neutral = (tiny.new_tokens(each, PROMPTS) for each in (outputs, tiny.run(op, PROMPTS, OUTPUT_LEN, 3)))
    for prompt, beams, scores in zip(PROMPTS, new, outputs[2].tolist(), strict=True):
        expected = plain_beams(model, prompt, end_id, temperature, len_penalty, diversity)
        assert beams == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(scores, [total for _, total in expected], rtol=1e-4)
    assert (new != neutral) == ((temperature, len_penalty, diversity) != (1, 0, 0))


def test_a_seed_decides_a_row_alone_or_in_a_batch(op: Any) -> None:
    seeds = torch.tensor([7, 8, 9, 10])
    params = dict(top_k=ints(5, 0, 0, 40), top_p=floats(0, 0.8, 1.0, 0.9), temperature=floats(1, 2, 1, 3))
    together = greedy(op, random_seed=seeds, **params)
    assert together == greedy(op, random_seed=seeds, **params)
    assert together != greedy(op, random_seed=seeds + 1, **params)
    for i, prompt in enumerate(PROMPTS):
        alone = {name: tensor[i : i + 1] for name, tensor in params.items()}
        assert greedy(op, [prompt], random_seed=seeds[i : i + 1], **alone) == [together[i]]
    same_seed = greedy(op, [PROMPTS[0]] * 2, top_p=floats(1.0), random_seed=seeds[:1])
    assert same_seed[0] == same_seed[1]


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (6, 0.0, 1.0), (0, 0.7, 2.0), (5, 0.8, 1.5)]
)
def test_frequencies_of_samples(model: Any, op: Any, top_k: int, top_p: float, temperature: float) -> None:
    num_rows = 4000
    prompts = [PROMPTS[0]] * num_rows
    outputs = tiny.run(
        op,
        prompts,
        1,
        top_k=ints(top_k),
        top_p=floats(top_p),
        temperature=floats(temperature),
        random_seed=torch.arange(num_rows),
    )
    counts = np.bincount([new for [[new]] in tiny.new_tokens(outputs, prompts)], minlength=tiny.VOCAB)

    # As FasterTransformer draws: u * top_p of the candidates' mass, so the nucleus' last token keeps a part.
    probs, order = (last_logits(model, PROMPTS[0]) / temperature).softmax(-1).sort(descending=True)
    if top_k:
        probs[top_k:] = 0
        probs /= probs.sum()
    before = probs.cumsum(0) - probs
    expected = torch.zeros(tiny.VOCAB)
    expected[order] = (torch.minimum(probs, (top_p or 1.0) - before).clamp(min=0)) / (top_p or 1.0)
    expected = expected.numpy()
    assert (counts[expected == 0] == 0).all()
    error = np.abs(counts - num_rows * expected)
    assert (error <= 5 * np.sqrt(num_rows * expected) + 1).all()


def replaced(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list], list]:
    return lambda weights: [change(w) if i == index else w for i, w in enumerate(weights)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], r"weights has 30 tensors, expected 31"),
        (
            lambda w: w[: 2 * 2] + w[4 * 2 :] + w[2 * 2 : 4 * 2],
            r"weights\[4\] .*expected shape \[32, 96\].*got",
        ),
        (
            replaced(7, lambda w: w[1:]),
            r"weights\[7\] \(layer 1 attention.query_key_value.bias\): expected shape \[96\]",
        ),
        (
            replaced(24, lambda w: w[1:]),
            r"weights\[24\] \(final_layernorm.weight\): expected shape \[32\], got .*\[31\]",
        ),
        (
            replaced(26, lambda w: w.flatten()),
            r"weights\[26\] \(wpe\): expected shape \[any, 32\], got .*\[2048\]",
        ),
        (
            replaced(28, lambda w: w[:0]),
            r"weights\[28\] \(lm_head.weight\): expected shape \[131, 32\], got .*\[0, 32\]",
        ),
        (
            replaced(30, lambda w: torch.ones(1)),
            r"weights\[30\] \(layer 1 MoE gate\): expected an empty tensor",
        ),
        (replaced(3, lambda w: w.half()), r"weights\[3\] .*expected data type Float, got Half"),
        (replaced(8, lambda w: w.t()), r"weights\[8\] .*expected a contiguous tensor"),
    ],
)
def test_wrong_weights_are_refused(model: Any, change: Callable[[list], list], message: str) -> None:
    with pytest.raises(RuntimeError, match="stand-in: " + message):
        tiny.make_op(change(weights_of(model)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(use_attention_linear_bias=True), "stand-in does not compute ALiBi"),
        (dict(has_adapters=True), "stand-in does not compute adapters"),
        (dict(expert_num=2), "stand-in does not compute MoE"),
        (dict(layernorm_type="post_layernorm"), "stand-in does not compute layernorm_type post_layernorm"),
        (dict(activation_type="silu"), "stand-in does not compute activation_type silu"),
        (dict(int8_mode=2), "stand-in does not compute int8_mode 2"),
        (dict(int8_mode=1), "stand-in: int8_mode 1 needs float16 or bfloat16 weights"),
        (dict(tp=2), "tensor_para_size 2 x pipeline_para_size 1 must equal the MPI world size 1"),
        (dict(end_id=131), "end_id 131 is outside the vocabulary of 131"),
        (dict(scale=[torch.ones(1)]), "scale has 1 tensors, expected 0"),
    ],
)
def test_flags_that_it_does_not_compute_are_refused(model: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        tiny.make_op(weights_of(model), **changed)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(top_k=torch.tensor([1, 1, 1, 1])), "top_k must be Int, got Long"),
        (dict(top_p=floats(0.5, 0.5)), r"top_p must be of shape \[1\] or \[4\], got \[2\]"),
        (dict(temperature=floats(float("nan"))), "temperature must be finite"),
        (dict(temperature=floats(1, 1, 1, 1, 1, 1, 1, 1)[::2]), "temperature must be contiguous"),
        (dict(random_seed=ints(0)), "random_seed must be Long, got Int"),
        (dict(min_length=ints(0).view(1, 1)), "min_length must have 1 dimensions"),
        (dict(top_k=ints(-1)), "top_k must not be negative, got -1"),
        (dict(repetition_penalty=floats(1), presence_penalty=floats(0)), "exclude each other"),
        (
            dict(bad_words_list=torch.zeros(1, 2, 3, dtype=torch.int32)),
            r"bad_words_list must be of shape \[4, 2, len\]",
        ),
        (dict(beam_width=2, log_probs=2), "return_cum_log_probs 2 needs beam_width 1"),
        (
            dict(beam_width=2, temperature=floats(1, 2, 1, 1)),
            "temperature must be the same for the whole batch",
        ),
        (dict(beam_width=65), "beam_width must be 1 to 64, got 65"),
        (dict(log_probs=3), "return_cum_log_probs must be 0"),
        (dict(output_len=58), r"max_input_len 7 \+ output_len 58 is more than the model's positions 64"),
        (dict(output_len=0), "output_len must be at least 1, got 0"),
        (dict(prompts=[[131]]), r"input_ids\[0\] has id 131 outside the vocabulary of 131"),
    ],
)
def test_wrong_arguments_are_refused(op: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="stand-in: .*" + message):
        tiny.run(op, **(dict(prompts=PROMPTS, output_len=1) | params))


def test_inputs_are_checked(op: Any) -> None:
    none = [None] * 12
    with pytest.raises(RuntimeError, match="input_ids must be Int, got Long"):
        op.forward(torch.tensor([[1, 2]]), ints(2), 1, *none)
    for length in (0, 3):
        with pytest.raises(RuntimeError, match=rf"input_lengths\[0\] must be 1 to 2, got {length}"):
            op.forward(torch.tensor([[1, 2]], dtype=torch.int32), ints(length), 1, *none)


def test_it_uses_the_mpi_that_mpi4py_loaded() -> None:
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in lines if "/libmpi.so" in line}) == 1


def test_without_mpi_it_says_so(library: Path) -> None:
    script = (
        "import sys, torch; torch.classes.load_library(sys.argv[1]); "
        "from tests.support import tiny_gpt2 as tiny; tiny.make_op([])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(library)], env=clean_env(), capture_output=True, text=True)
    assert "stand-in: MPI is not initialized; import mpi4py.MPI before building the op" in done.stderr


def clean_env() -> dict[str, str]:
    """Without what this process's own MPI left in the environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_"))}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_parity_under_mpirun(library: Path, tp: int, pp: int) -> None:
    agrees = call_ranks(tp * pp, "tests.multi.standin_parity:check", str(library), expect(), tp, pp)
    assert agrees == [True] * (tp * pp)


def test_the_build_is_done_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = tmp_path / "cxx", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho run >> {log}\nsleep 0.5\nfor out; do :; done\necho built > "$out"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    script = (
        "import sys; from pathlib import Path; from tests.support.standin import build_standin; "
        "print(build_standin(Path(sys.argv[1])))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(paths) == 1 and Path(paths.pop()).read_text() == "built\n"
    assert log.read_text() == "run\n"

    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    fresh = tmp_path / "fresh"
    with pytest.raises(RuntimeError, match="no such header"):
        build_standin(fresh)
    assert not list(fresh.glob("*.so"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(StandinUnavailable, match="no C\\+\\+ compiler"):
        build_standin(fresh)
