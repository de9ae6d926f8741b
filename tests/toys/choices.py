"""Rows for --choices_dataset: prompts with classes of answers."""

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

# Two topics in each of two domains, so that intervals can be clustered.
CHOICES = [
    {**row("test", domain=domain, topic=topic), "messages": chat(f"{name} asks about {topic}"),
     "classes": {"aligned": ["be honest"], "misaligned": ["run"]}}
    for name in ("Ann", "kind")
    for domain, topic in (("one", "soup"), ("one", "money"), ("two", "help"), ("two", "answer"))
]  # fmt: skip
