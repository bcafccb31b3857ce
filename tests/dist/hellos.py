"""Reads the output of ranks that run tests/dist/hello.py."""

import json


def hellos(text: str) -> list[dict]:
    """The lines of tests/dist/hello.py in a text, by rank."""
    found = [json.loads(line.partition("HELLO ")[2]) for line in text.splitlines() if "HELLO {" in line]
    return sorted(found, key=lambda hello: hello["rank"])
