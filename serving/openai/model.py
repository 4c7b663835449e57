"""The served model, as the API names and describes it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from serving.openai.errors import OpenAIError
from serving.tokenization import RequestEncoder


@dataclass(frozen=True)
class ServedModel:
    """The model's name, its Hub id or path, its tokenizer and its limits."""

    name: str
    root: str
    encoder: RequestEncoder
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "server.py",
            "root": self.root,
            "parent": None,
            "max_model_len": self.encoder.max_seq_len,
        }

    def check_name(self, name: str | None) -> None:
        """Raise OpenAIError where a request names another model. Its root is a name too: clients read it as one."""
        if name is not None and name not in (self.name, self.root):
            raise OpenAIError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {self.name!r}",
                "model",
                "model_not_found",
            )
