"""What a request may ask to be told: log-probabilities, alternatives, logits; and its parameters end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from engine.engine import Engine
from engine.request import Request, SamplingParams
from tests.support.engines import finish, hf_greedy, make_engine, prompts

NEW_TOKENS = 20


@pytest.fixture(scope="module")
def engine(converted: Callable[[int], Path]) -> Engine:
    return make_engine(converted(1), max_batch_size=9, max_step_tokens=24, block_size=4)


@pytest.fixture(scope="module")
def model(gpt2_source: tuple[Path, GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return gpt2_source[1]


def hf_log_probs(model: GPT2LMHeadModel, ids: list[int]) -> np.ndarray:
    """[tokens, vocab]: Hugging Face's log_softmax after each token."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1).numpy()


SAMPLINGS = [
    SamplingParams(NEW_TOKENS, num_log_probs=5, prompt_log_probs=True, num_prompt_log_probs=4, next_token_logits=True),
    SamplingParams(NEW_TOKENS, top_k=30, temperature=0.6, repetition_penalty=1.4, num_log_probs=3, random_seed=3),
    SamplingParams(NEW_TOKENS, top_p=0.9, n=3, num_log_probs=1, prompt_log_probs=True, next_token_logits=True),
    SamplingParams(NEW_TOKENS, beam_width=4, num_log_probs=2, prompt_log_probs=True, num_prompt_log_probs=1),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "samples", "beams"])
def test_log_probs_are_hugging_faces(sampling: SamplingParams, engine: Engine, model: GPT2LMHeadModel) -> None:
    """Of the model's own logits, whatever temperature and penalties made of them; the prompt comes in pieces."""
    prompt_ids = prompts(3)[2]
    assert len(prompt_ids) > 24
    request = Request(prompt_ids, sampling)
    strangers = [Request(ids, SamplingParams(7)) for ids in prompts(4)]
    finish(engine, [*strangers, request])
    for output in request.outputs:
        expected = hf_log_probs(model, prompt_ids + output.token_ids)
        of_tokens = expected[np.arange(len(prompt_ids) - 1, len(expected) - 1), output.token_ids]
        np.testing.assert_allclose(output.log_probs, of_tokens, atol=1e-4)
        assert output.cum_log_prob == pytest.approx(of_tokens.sum(), abs=1e-3)
        for place, alternatives in enumerate(output.alternatives):
            row = expected[len(prompt_ids) - 1 + place]
            best = np.argsort(-row)[: sampling.num_log_probs]
            assert [token_id for token_id, _ in alternatives] == best.tolist()
            np.testing.assert_allclose([value for _, value in alternatives], row[best], atol=1e-4)
    expected = hf_log_probs(model, prompt_ids)
    if sampling.prompt_log_probs:
        of_prompt = expected[np.arange(len(prompt_ids) - 1), prompt_ids[1:]]
        np.testing.assert_allclose(request.prompt_log_probs, of_prompt, atol=1e-4)
    count = sampling.num_prompt_log_probs
    assert len(request.prompt_alternatives) == (len(prompt_ids) - 1 if count else 0)
    for row, alternatives in zip(expected, request.prompt_alternatives, strict=False):
        best = np.argsort(-row)[:count]
        assert [token_id for token_id, _ in alternatives] == best.tolist()
        np.testing.assert_allclose([value for _, value in alternatives], row[best], atol=1e-4)
    if sampling.next_token_logits:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids])).logits[0, -1].numpy()
        np.testing.assert_allclose(request.next_token_logits, logits, atol=1e-4)


def test_repetition_penalty_and_min_length_equal_hugging_face(engine: Engine, model: GPT2LMHeadModel) -> None:
    inputs = prompts(3)
    plain = [hf_greedy(model, ids, NEW_TOKENS) for ids in inputs]
    requests = [
        Request(ids, SamplingParams(NEW_TOKENS, repetition_penalty=1.3, min_length=8), (tokens[3],))
        for ids, tokens in zip(inputs, plain, strict=True)
    ]
    finish(engine, requests)
    for request in requests:
        out = model.generate(
            torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=8,
            repetition_penalty=1.3,
            do_sample=False,
            eos_token_id=request.end_ids[0],
            pad_token_id=0,
        )
        assert request.output_ids == out[0, len(request.prompt_ids) :].tolist()
        assert len(request.output_ids) >= 8
    assert [r.output_ids for r in requests] != [tokens[:NEW_TOKENS] for tokens in plain]


def test_presence_and_frequency_by_their_definition(engine: Engine, model: GPT2LMHeadModel) -> None:
    prompt_ids = prompts(2)[1]
    request = Request(prompt_ids, SamplingParams(NEW_TOKENS, presence_penalty=1.5, frequency_penalty=0.8))
    finish(engine, [request])
    ids = list(prompt_ids)
    for _ in range(NEW_TOKENS):
        scores = hf_log_probs(model, ids)[-1].copy()
        scores[list(set(ids))] -= 1.5
        for token_id in ids[len(prompt_ids) :]:
            scores[token_id] -= 0.8
        ids.append(int(scores.argmax()))
    assert request.output_ids == ids[len(prompt_ids) :]
    assert request.output_ids != hf_greedy(model, prompt_ids, NEW_TOKENS)


def test_a_bias_and_openais_penalties_by_their_definition(engine: Engine, model: GPT2LMHeadModel) -> None:
    """A greedy text with each; the log-probabilities stay the model's own. A stranger takes the plain path."""
    prompt_ids = prompts(2)[1]
    plain = hf_greedy(model, prompt_ids, NEW_TOKENS)
    bias = ((plain[0], -100.0), (plain[5], 2.5))
    openai = dict(openai_penalties=True, presence_penalty=1.5, frequency_penalty=0.8, temperature=0.0)
    requests = [
        Request(prompt_ids, SamplingParams(NEW_TOKENS, logit_bias=bias)),
        Request(prompt_ids, SamplingParams(NEW_TOKENS, **openai)),
        Request(prompt_ids, SamplingParams(NEW_TOKENS)),
    ]
    finish(engine, requests)
    assert requests[2].output_ids == plain[:NEW_TOKENS]
    for request, is_biased in zip(requests, (True, False), strict=False):
        ids, log_probs = list(prompt_ids), []
        for _ in range(NEW_TOKENS):
            row = hf_log_probs(model, ids)[-1]
            scores, output_ids = row.copy(), ids[len(prompt_ids) :]
            for token_id, value in bias if is_biased else ():
                scores[token_id] += value
            for token_id in set(output_ids) if not is_biased else ():
                scores[token_id] -= 1.5 + 0.8 * output_ids.count(token_id)
            ids.append(int(scores.argmax()))
            log_probs.append(row[ids[-1]])
        assert request.output_ids == ids[len(prompt_ids) :] != plain[:NEW_TOKENS]
        np.testing.assert_allclose(request.outputs[0].log_probs, log_probs, atol=1e-4)


def test_one_token_has_no_prompt_alternatives(engine: Engine) -> None:
    request = Request([5], SamplingParams(2, prompt_log_probs=True, num_prompt_log_probs=3))
    finish(engine, [request])
    assert (request.prompt_log_probs, request.prompt_alternatives) == ([], [])


def test_samples_are_different_and_each_is_a_request_with_the_next_seed(engine: Engine) -> None:
    prompt_ids = prompts(3)[2]
    sampling = dict(max_new_tokens=NEW_TOKENS, top_p=0.95, repetition_penalty=1.2)
    together = Request(prompt_ids, SamplingParams(**sampling, n=5, random_seed=2**64 - 2))
    again = Request(prompt_ids, SamplingParams(**sampling, n=5, random_seed=2**64 - 2))
    alone = [Request(prompt_ids, SamplingParams(**sampling, random_seed=(2**64 - 2 + i) % 2**64)) for i in range(5)]
    finish(engine, [together])
    finish(engine, [again, *alone])
    texts = [output.token_ids for output in together.outputs]
    assert len({tuple(text) for text in texts}) == 5
    assert texts == [output.token_ids for output in again.outputs]
    assert texts == [request.output_ids for request in alone]


def test_the_prompt_of_samples_is_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    execute = engine.executor.execute

    def counting(plan: object) -> object:
        computed.append(plan.num_tokens)
        return execute(plan)

    monkeypatch.setattr(engine.executor, "execute", counting)
    prompt_ids = prompts(1)[0][::-1]  # begins like no other, so none of it is found
    finish(engine, [Request(prompt_ids, SamplingParams(4, top_k=9, n=4))])
    assert sum(computed) == len(prompt_ids) + 4 * 3


def test_beams_with_diversity_follow_fasttransformers_rule(engine: Engine, model: GPT2LMHeadModel) -> None:
    """Each beam's r-th best continuation gets rate · r where continuations are compared; scores stay as they are."""
    prompt_ids, width, rate, steps = prompts(1)[0], 3, -0.6, 6
    sampling = SamplingParams(steps, beam_width=width, beam_search_diversity_rate=rate, len_penalty=0.0)
    request = Request(prompt_ids, sampling)
    finish(engine, [request])
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        candidates = []
        for score, tokens in beams:
            row = hf_log_probs(model, prompt_ids + tokens)[-1].astype(np.float64)
            for rank, token_id in enumerate(np.argsort(-row)[: 2 * width]):
                candidates.append(
                    (score + row[token_id] + rate * rank, score + row[token_id], [*tokens, int(token_id)])
                )
        candidates.sort(key=lambda candidate: -candidate[0])
        beams = [(score, tokens) for _, score, tokens in candidates[:width]]
    beams.sort(key=lambda beam: -beam[0])
    assert [output.token_ids for output in request.outputs] == [tokens for _, tokens in beams]
