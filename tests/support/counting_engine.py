"""An engine without a model, and a tokenizer of letters, for tests of what stands before the engine."""

from __future__ import annotations

import threading
import time

from engine.request import CANCELLED, Output, Request
from serving.tokenization import RequestEncoder

END = 9
LETTERS = "abcdefghijk"


class LetterTokenizer:
    """One token per letter; j is the end token, and the model does not know k."""

    all_special_ids = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [LETTERS.index(letter) for letter in text.replace(" ", "")]

    def decode(self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return "".join(LETTERS[i] for i in token_ids)

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(LETTERS)}


class CountingEngine:
    """Answers from another thread with 0, 1, 2 … of log-probability -0.5; a prompt that begins with b ends early."""

    has_token_log_probs = True

    def __init__(self, delay_s: float = 0.0) -> None:
        self.seen: list[Request] = []
        self.cancelled: list[Request] = []
        self.delay_s = delay_s

    def check_room(self, num_requests: int) -> None:
        pass

    def submit(self, *requests: Request) -> None:
        self.seen += requests
        threading.Thread(target=self._work, args=(requests,)).start()

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request)

    def _work(self, requests: tuple[Request, ...]) -> None:
        for request in requests:
            if request.sampling.beam_width > 1:
                request.outputs = [Output() for _ in range(request.sampling.beam_width)]
            while not request.is_finished:
                time.sleep(self.delay_s)
                for output in request.outputs:
                    self._append(request, output)
                request.is_finished = all(output.finish_reason for output in request.outputs)
                if request in self.cancelled:
                    request.end(CANCELLED)
                else:
                    request.on_update(request)

    def _append(self, request: Request, output: Output) -> None:
        count = len(output.token_ids)
        token_id = END if request.prompt_ids[0] == 1 and count == 1 else count % END
        if num_log_probs := request.sampling.num_log_probs:
            output.alternatives.append(((token_id, -0.5), (8, -2.0))[:num_log_probs])
        output.append(token_id, -0.5)
        output.finish_reason = request.reason_to_end(output.token_ids)


def letter_encoder() -> RequestEncoder:
    """For a model of 10 tokens that serves 300 positions."""
    return RequestEncoder(LetterTokenizer(), (END,), 10, 300)
