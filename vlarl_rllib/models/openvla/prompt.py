"""The text that asks OpenVLA for an action. Importing this loads no torch."""

PROMPT_TEMPLATE = "In: What action should the robot take to {instruction}?\nOut:"


def build_prompt(instruction: str) -> str:
    """The text that asks for an action; the instruction is lower-cased, as in training."""
    return PROMPT_TEMPLATE.format(instruction=instruction.lower())
