"""`GenerationRequest` → the engine's `Request`: tokens, within the vocabulary and the limits.

This is the only place that makes the engine's requests. It knows the tokenizer and the vocabulary; it knows no front
end and does not run anything. Everything is counted before it is tokenized, so a request that is refused costs
little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.request import ParameterError, Request, SamplingParams
from engine.words import Vocabulary, Words
from serving.request import GenerationRequest
from serving.text import token_bytes

_MAX_LOG_PROBS = 64  # alternatives per token
_MAX_WORDS = 256  # stop or bad words of a prompt
_MAX_WORD_BYTES = 256
_MAX_WORDS_BYTES = 4096  # of all stop or bad words of a prompt together
# The memory that one front-end request may take on rank 0: alternatives of all its tokens, logits of all its prompts.
_MAX_ALTERNATIVES = 1 << 18
_MAX_LOGITS = 1 << 24
_MIN_BYTES_PER_TOKEN = 64  # that a text may have: tokenizers drop some, of white space for instance


class RequestEncoder:
    """Tokenizes and checks requests.

    tokenizer: of transformers; end_ids: tokens that end a text by default; vocab_size: of the model; max_seq_len:
    tokens of the longest sequence served.
    """

    def __init__(self, tokenizer: Any, end_ids: tuple[int, ...], vocab_size: int, max_seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        spellings = token_bytes(tokenizer, vocab_size)
        self.max_prompt_bytes = max_seq_len * max(_MIN_BYTES_PER_TOKEN, *map(len, spellings))
        self.vocabulary = Vocabulary(spellings)
        self.vocabulary.words([b"a"], [b"ab"])  # makes its indexes, which take a large vocabulary 0.2 s

    def encode(self, requests: Iterable[GenerationRequest]) -> list[tuple[GenerationRequest, Request]]:
        """Each request with the engine's request for it. May be called from any thread.

        requests: the prompts of one front-end request. An iterator is advanced here, so it may parse as it goes.
        Raises ParameterError for the first thing that is wrong; its index is the prompt's place.
        """
        requests = list(requests)
        self._check_memory([request.sampling for request in requests])
        return [(request, self._encode(request, index)) for index, request in enumerate(requests)]

    def _check_memory(self, samplings: Sequence[SamplingParams]) -> None:
        for sampling in samplings:
            self._check_sampling(sampling)
        alternatives = sum(s.num_log_probs * s.max_new_tokens * s.width for s in samplings)
        if alternatives > _MAX_ALTERNATIVES:
            raise ParameterError(
                "num_log_probs",
                f"asks for {alternatives} alternatives in one request; at most {_MAX_ALTERNATIVES} are kept",
            )
        logits = sum(s.next_token_logits for s in samplings) * self.vocab_size
        if logits > _MAX_LOGITS:
            raise ParameterError(
                "next_token_logits", f"asks for {logits} logits in one request; at most {_MAX_LOGITS} are kept"
            )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for field in ("top_k", "num_log_probs"):
            value = getattr(sampling, field)
            if value > self.vocab_size:
                raise ParameterError(field, f"is {value}; the vocabulary has {self.vocab_size} tokens")
        self._check_id("top_p_reset_id", sampling.top_p_reset_id)
        if sampling.num_log_probs > _MAX_LOG_PROBS:
            raise ParameterError(
                "num_log_probs", f"is {sampling.num_log_probs}; it must be between 0 and {_MAX_LOG_PROBS}"
            )

    def _encode(self, request: GenerationRequest, index: int) -> Request:
        prompt_ids = self._prompt_ids(request, index)
        end_ids = self.end_ids if request.end_ids is None else request.end_ids
        for end_id in end_ids:
            self._check_id("end_ids", end_id)
        words = self._words(request, end_ids, index)
        if request.ignore_eos:
            end_ids = ()
        return Request(
            prompt_ids,
            request.sampling,
            end_ids,
            words=words,
            bad_word_ids=self._bad_word_ids(request.bad_words),
        )

    def _prompt_ids(self, request: GenerationRequest, index: int) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, (str, bytes)):
            field, prompt_ids = "prompt", self._tokenize(prompt, index)
        else:
            field, prompt_ids = "prompt_ids", self._copied(prompt, index)
        if not prompt_ids and request.start_id is not None:
            self._check_id("start_id", request.start_id)
            prompt_ids = [request.start_id]
        if not prompt_ids:
            raise ParameterError(field, "is empty; it must have at least one token", index=index)
        for token_id in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= token_id < self.vocab_size:  # one that was added to the tokenizer and not to the model, say
                raise ParameterError(
                    field, f"has token {token_id}; the vocabulary has {self.vocab_size} tokens", index=index
                )
        return prompt_ids

    def _copied(self, prompt_ids: Sequence[int], index: int) -> list[int]:
        if len(prompt_ids) > self.max_seq_len:
            raise ParameterError(
                "prompt_ids",
                f"has {len(prompt_ids)} tokens; the longest sequence served is {self.max_seq_len} tokens",
                index=index,
            )
        return [int(token_id) for token_id in prompt_ids]

    def _tokenize(self, prompt: str | bytes, index: int) -> list[int]:
        num_bytes = len(prompt if isinstance(prompt, bytes) else _encoded(prompt, "prompt", index))
        if num_bytes > self.max_prompt_bytes:  # to tokenize it would take long, and could not end well
            raise ParameterError(
                "prompt",
                f"has {num_bytes} bytes; at most {self.max_prompt_bytes} are taken "
                f"for the {self.max_seq_len} tokens of the longest sequence served",
                index=index,
            )
        text = prompt if isinstance(prompt, str) else decoded(prompt, "prompt", index)
        return self.tokenizer.encode(text) if text else []

    def _check_id(self, field: str, token_id: int) -> None:
        if token_id >= self.vocab_size:
            raise ParameterError(field, f"is {token_id}; the vocabulary has {self.vocab_size} tokens")

    def _words(self, request: GenerationRequest, end_ids: tuple[int, ...], index: int) -> Words | None:
        stop = _checked_words("stop_words", request.stop_words, index)
        bad = _checked_words("bad_words", request.bad_words, index)
        words = self.vocabulary.words(stop, bad)
        if words is not None:
            banned = words.always_banned
            num_more = sum(end_id not in banned for end_id in end_ids) if request.sampling.min_length else 0
            if len(banned) + num_more >= self.vocab_size:
                raise ParameterError("bad_words", "leaves no token of the vocabulary to choose from")
        return words

    def _bad_word_ids(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Each word's tokens at the beginning of a text and after a space, which most tokenizers write differently."""
        spellings = [
            self.tokenizer.encode(text, add_special_tokens=False) for word in bad_words for text in (word, f" {word}")
        ]
        return [ids for index, ids in enumerate(spellings) if ids and ids not in spellings[:index]]


def decoded(value: bytes, field: str, index: int | None = None) -> str:
    """UTF-8 as text. Raises ParameterError that names `field` where it is not valid."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ParameterError(field, f"is not valid UTF-8: {error.reason} at byte {error.start}", index=index) from None


def _encoded(text: str, field: str, index: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(field, f"is not valid text: {error.reason} at {error.start}", index=index) from None


def _checked_words(field: str, words: Sequence[str], index: int) -> list[bytes]:
    if len(words) > _MAX_WORDS:
        raise ParameterError(field, f"has {len(words)} words; at most {_MAX_WORDS} are allowed", index=index)
    encoded = [_encoded(word, field, index) for word in words]
    total = sum(map(len, encoded))
    if total > _MAX_WORDS_BYTES:
        raise ParameterError(field, f"has words of {total} bytes; at most {_MAX_WORDS_BYTES} are allowed", index=index)
    longest = next((len(word) for word in encoded if len(word) > _MAX_WORD_BYTES), None)
    if longest is not None:
        raise ParameterError(
            field, f"has a word of {longest} bytes; at most {_MAX_WORD_BYTES} are allowed", index=index
        )
    return encoded
