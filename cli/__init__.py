"""Parts of client.py: parameters and prompts, transport, output, benchmark, terminal."""
