"""Digests that identify a source."""

import hashlib
import json


def digest(*parts: object) -> str:
    """Returns 16 hexadecimal digits that differ for values whose JSON differs."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
