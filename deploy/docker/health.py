"""The container's health check: whether HEALTH_URL answers with 200; exit code 0 or 1.

A certificate is not checked: it names the server's host, not localhost.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request


def main() -> int:
    url, context = os.environ["HEALTH_URL"], ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=4, context=context if url.startswith("https") else None):
            return 0
    except OSError as error:
        print(f"{url}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
