"""Text that would do harm in a page that took it for markup. It is not a test."""

from typing import Any

# Ends an element, an attribute, a comment or a block of data; runs if taken for script, template, formula or address.
TEXTS = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "\"><img src=x onerror='alert(3)'>",
    "javascript:alert(4)",
    "<!--<svg onload=alert(5)>",
    "</title></style>{{ 7 * 7 }}",
    "$x^2$ & ]]>\u2028\\",
)
HOSTILE = " ".join(TEXTS)


def spoil(value: Any) -> Any:
    """Plain data with every text but hashes and splits made hostile."""
    if isinstance(value, dict):
        return {key: item if key in ("hash", "split") else spoil(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoil(item) for item in value]
    return HOSTILE if isinstance(value, str) else value
