"""Where the OpenAI API listens, and whom it answers."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from engine.flags import flag
from helpers import one_line

_KEY_VARIABLE = "SERVER_API_KEY"


@dataclass(frozen=True)
class OpenAIFlags:
    """Where the OpenAI API listens, and whom it answers."""

    openai_port: int = flag(9000, "port of the OpenAI API, on --http-address; 0: off")
    api_key: str = flag("", f"key that clients of the OpenAI API must send; by default ${_KEY_VARIABLE}")
    ssl_certfile: str = flag("", "TLS certificate (PEM) of the OpenAI port; with it, the port speaks HTTPS only")
    ssl_keyfile: str = flag("", "its private key (PEM); by default it is in the certificate's file")
    chat_template: str = flag("", "file with a Jinja chat template, in place of the tokenizer's own")
    max_request_bytes: int = flag(16 << 20, "longest body of a request, bytes")

    def __post_init__(self) -> None:
        if not 0 <= self.openai_port <= 65535:
            raise ValueError(f"openai_port is {self.openai_port}; it must be between 0 and 65535")
        if self.max_request_bytes < 1:
            raise ValueError(f"max_request_bytes is {self.max_request_bytes}; it must be at least 1")
        for name in ("ssl_certfile", "ssl_keyfile", "chat_template"):
            path = getattr(self, name)
            if path and not (os.path.isfile(path) and os.access(path, os.R_OK)):
                raise ValueError(f"{name} is {path!r}; it must be a file that can be read")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError(f"ssl_keyfile is {self.ssl_keyfile!r}; ssl_certfile must be set with it")
        if self._given_key and not self.key:  # a secret that was not filled in must not open the port
            raise ValueError(f"api_key is blank (--api-key or ${_KEY_VARIABLE}); it must have a visible character")
        self.make_tls_context()

    @property
    def _given_key(self) -> str:
        return self.api_key or os.environ.get(_KEY_VARIABLE, "")

    @property
    def key(self) -> str:
        """The key that clients must send; "": none."""
        return self._given_key.strip()

    def read_chat_template(self) -> str | None:
        """The template's text; None where none is given. Raises ValueError for a file that is not UTF-8."""
        try:
            return Path(self.chat_template).read_text(encoding="utf-8") if self.chat_template else None
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template is {self.chat_template!r}; it must be UTF-8 ({one_line(error)})") from None

    def make_tls_context(self) -> ssl.SSLContext | None:
        """The port's TLS; None: plain HTTP. Raises ValueError for files that do not fit."""
        if not self.ssl_certfile:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # An empty password: an encrypted key is an error, where OpenSSL would ask the terminal for its password.
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile or None, password="")
        except ssl.SSLError as error:
            raise ValueError(f"ssl_certfile is {self.ssl_certfile!r}; it cannot be used ({one_line(error)})") from None
        return context
