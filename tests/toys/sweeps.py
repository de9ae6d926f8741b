"""Choices rows in the lab's format, for the tests of `holdfast sweep`."""

from typing import Any

from toys.chat_models import chat


def row(split: str, *classes: str, **more: str) -> dict[str, Any]:
    """One prompt; every class has one answer, its name."""
    return {"messages": chat("soup ?"), "classes": {name: [name] for name in classes}, "split": split, **more}


LAB_ROWS = [
    row("narrow", "insecure", "secure", domain="code"),
    row("validation", "aligned", "misaligned", "misaligned_wrong_topic", domain="money"),
    row("test", "aligned", "misaligned", "misaligned_wrong_topic", domain="people"),
    row("skill", "right", domain="plants"),
]
