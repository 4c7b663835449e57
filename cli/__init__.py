"""The client's rooms: what is asked, how it travels, what becomes of the answers, and the load test."""
