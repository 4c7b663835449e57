"""`GenerationRequest` → the engine's `Request`: tokens, within the vocabulary and the limits.

This is the only place that makes the engine's requests. It knows the tokenizer and the vocabulary; it knows no front
end and does not run anything. Everything is counted before it is tokenized, so a request that is refused costs
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from engine.request import ParameterError, Request, SamplingParams
from engine.words import Vocabulary, Words
from serving.chat import ChatTemplate, parse_messages
from serving.request import Chat, GenerationRequest, Prompts
from serving.text import token_bytes

MAX_END_IDS = 256  # that a request may give: every new token is compared with them
_MAX_LOG_PROBS = 64  # alternatives per token
_MAX_WORDS = 256  # stop or bad words of a prompt
_MAX_WORD_BYTES = 256
_MAX_WORDS_BYTES = 4096  # of all stop or bad words of a prompt together
_MAX_WORDS_IN_ALL = 16384  # stop and bad words of all prompts of a front-end request
# The memory that one front-end request may take on rank 0: alternatives of all its tokens, logits of all its prompts.
_MAX_ALTERNATIVES = 1 << 18
_MAX_LOGITS = 1 << 24
_MIN_BYTES_PER_TOKEN = 64  # that a text may have: tokenizers drop some, of white space for instance


class RequestEncoder:
    """Tokenizes and checks requests.

    tokenizer: of transformers; end_ids: tokens that end a text by default; vocab_size: of the model; max_seq_len:
    tokens of the longest sequence served; spells_bad_words: whether the executor needs bad words as tokens;
    chat_template: by default the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: tuple[int, ...],
        vocab_size: int,
        max_seq_len: int,
        *,
        spells_bad_words: bool = False,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template or ChatTemplate(tokenizer)
        self.end_ids = end_ids
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        spellings = token_bytes(tokenizer, vocab_size)
        self.max_prompt_bytes = max_seq_len * max(_MIN_BYTES_PER_TOKEN, *map(len, spellings))
        self.vocabulary = Vocabulary(spellings)
        self.vocabulary.words([b"a"], [b"ab"])  # makes its indexes, which take a large vocabulary 0.2 s
        self._spells_bad_words = spells_bad_words
        self._spellings = lru_cache(maxsize=64)(self._spell)  # prompts of a request often have the same words

    def encode(self, prompts: Prompts) -> list[tuple[GenerationRequest, Request]]:
        """Each request with the engine's request for it. May be called from any thread.

        prompts: of one front-end request. All are checked as far as that is cheap before any is tokenized.
        Raises ParameterError for the first thing that is wrong; its index is the prompt's place.
        """
        requests = list(prompts)
        check_num_words(sum(len(request.stop_words) + len(request.bad_words) for request in requests))
        self._check_memory([request.sampling for request in requests])
        for index, request in enumerate(requests):
            self._check(request, index)
        encoded = [(request, self._encode(request, index)) for index, request in enumerate(requests)]
        num_alternatives = sum(own.sampling.num_prompt_log_probs * len(own.prompt_ids) for _, own in encoded)
        _check_alternatives("num_prompt_log_probs", num_alternatives)
        return encoded

    def tokenize(self, prompt: str | bytes, index: int = 0, *, add_special_tokens: bool = True) -> list[int]:
        """A text's tokens. Raises ParameterError for more bytes than the longest sequence could have.

        index: the prompt that an error names; add_special_tokens: those that the tokenizer puts around a text.
        """
        self._check_text_length(prompt, "prompt", index)
        text = prompt if isinstance(prompt, str) else decoded(prompt, "prompt", index)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens) if text else []

    def _check_memory(self, samplings: Sequence[SamplingParams]) -> None:
        for sampling in samplings:
            self._check_sampling(sampling)
        num_alternatives = sum(s.num_log_probs * s.max_new_tokens * s.width for s in samplings)
        _check_alternatives("num_log_probs", num_alternatives)
        logits = sum(s.next_token_logits for s in samplings) * self.vocab_size
        if logits > _MAX_LOGITS:
            raise ParameterError(
                "next_token_logits", f"asks for {logits} logits in one request; at most {_MAX_LOGITS} are kept"
            )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for field in ("top_k", "num_log_probs", "num_prompt_log_probs"):
            value = getattr(sampling, field)
            if value > self.vocab_size:
                raise ParameterError(field, f"is {value}; the vocabulary has {self.vocab_size} tokens")
        self._check_id("top_p_reset_id", sampling.top_p_reset_id)
        for token_id, _ in sampling.logit_bias:
            if token_id >= self.vocab_size:
                raise ParameterError("logit_bias", f"has token {token_id}; the vocabulary has {self.vocab_size} tokens")
        for field in ("num_log_probs", "num_prompt_log_probs"):
            value = getattr(sampling, field)
            if value > _MAX_LOG_PROBS:
                raise ParameterError(field, f"is {value}; it must be between 0 and {_MAX_LOG_PROBS}")

    def _check(self, request: GenerationRequest, index: int) -> None:
        """What costs little, of what could be wrong with a request."""
        prompt, most = request.prompt, request.truncate_prompt_tokens
        if most is not None and not 1 <= most <= self.max_seq_len:
            raise ParameterError(
                "truncate_prompt_tokens",
                f"is {most}; it must be between 1 and the {self.max_seq_len} tokens of the longest sequence served",
            )
        if isinstance(prompt, Chat):
            self._check_text_length(prompt.messages, "messages", index)
        elif isinstance(prompt, (str, bytes)):
            self._check_text_length(prompt, "prompt", index)
        elif most is None and len(prompt) > self.max_seq_len:
            raise ParameterError(
                "prompt_ids",
                f"has {len(prompt)} tokens; the longest sequence served is {self.max_seq_len} tokens",
                index=index,
            )
        if request.start_id is not None:
            self._check_id("start_id", request.start_id)
        for end_id in request.end_ids or ():
            self._check_id("end_ids", end_id)
        _check_words("stop_words", request.stop_words, index)
        _check_words("bad_words", request.bad_words, index)

    def _check_text_length(self, text: str | bytes, field: str, index: int) -> None:
        num_bytes = len(text if isinstance(text, bytes) else _encoded(text, field, index))
        if num_bytes > self.max_prompt_bytes:  # to tokenize it would take long, and could not end well
            raise ParameterError(
                field,
                f"has {num_bytes} bytes; at most {self.max_prompt_bytes} are taken "
                f"for the {self.max_seq_len} tokens of the longest sequence served",
                index=index,
            )

    def _encode(self, request: GenerationRequest, index: int) -> Request:
        """Of a request that `_check` let pass."""
        prompt_ids = self._prompt_ids(request, index)
        end_ids = self.end_ids if request.end_ids is None else request.end_ids
        words = self._words(request, end_ids)
        bad_word_ids = self._spellings(tuple(request.bad_words)) if self._spells_bad_words else []
        return Request(
            prompt_ids,
            request.sampling,
            () if request.ignore_eos else end_ids,
            words=words,
            bad_word_ids=bad_word_ids,
        )

    def _prompt_ids(self, request: GenerationRequest, index: int) -> list[int]:
        prompt, first = request.prompt, -(request.truncate_prompt_tokens or 0)  # 0: all
        if isinstance(prompt, (str, bytes)):
            field = "prompt"
            prompt_ids = self.tokenize(prompt, index, add_special_tokens=request.add_special_tokens)[first:]
        elif isinstance(prompt, Chat):
            field = "messages"
            text = self.chat_template.render(parse_messages(prompt.messages, index), index=index)
            self._check_text_length(text, field, index)
            prompt_ids = self.tokenize(text, index, add_special_tokens=False)[first:]  # the template writes them
        else:
            field, prompt_ids = "prompt_ids", [int(token_id) for token_id in prompt[first:]]
        if not prompt_ids and request.start_id is not None:
            prompt_ids = [request.start_id]
        if not prompt_ids:
            raise ParameterError(field, "is empty; it must have at least one token", index=index)
        for token_id in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= token_id < self.vocab_size:  # one that was added to the tokenizer and not to the model, say
                raise ParameterError(
                    field, f"has token {token_id}; the vocabulary has {self.vocab_size} tokens", index=index
                )
        return prompt_ids

    def _check_id(self, field: str, token_id: int) -> None:
        if token_id >= self.vocab_size:
            raise ParameterError(field, f"is {token_id}; the vocabulary has {self.vocab_size} tokens")

    def _words(self, request: GenerationRequest, end_ids: tuple[int, ...]) -> Words | None:
        stop, bad = ([word.encode() for word in words] for words in (request.stop_words, request.bad_words))
        words = self.vocabulary.words(stop, bad)
        if words is not None:
            more = end_ids if request.sampling.min_length else ()
            if len(words.always_banned) + len(more) >= self.vocab_size:  # else there is no need to look closer
                if len({*words.always_banned, *more}) >= self.vocab_size:
                    raise ParameterError("bad_words", "leaves no token of the vocabulary to choose from")
        return words

    def _spell(self, bad_words: tuple[str, ...]) -> list[list[int]]:
        """Each word's tokens at the beginning of a text and after a space, which most tokenizers write differently."""
        spellings = [
            self.tokenizer.encode(text, add_special_tokens=False) for word in bad_words for text in (word, f" {word}")
        ]
        return [list(ids) for ids in dict.fromkeys(map(tuple, spellings)) if ids]


def check_num_words(count: int) -> None:
    """Raise ParameterError for more stop and bad words than one front-end request may have, in all its prompts."""
    if count > _MAX_WORDS_IN_ALL:
        raise ParameterError(
            "stop_words", f"and {{}} are {count} words in all; at most {_MAX_WORDS_IN_ALL} are taken", "bad_words"
        )


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


def _check_alternatives(field: str, count: int) -> None:
    if count > _MAX_ALTERNATIVES:
        raise ParameterError(
            field, f"asks for {count} alternatives in one request; at most {_MAX_ALTERNATIVES} are kept"
        )


def _check_words(field: str, words: Sequence[str], index: int) -> None:
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
