"""Digests of what identifies a source."""

import hashlib
import json


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that tell values from others that JSON writes differently."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
