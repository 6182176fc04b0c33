"""Choosing action tokens from logits, so that each row depends on its own seed alone.

B = batch, V = action ids (256).
"""

import torch
from torch import Tensor


def draw_noise(seeds: Tensor | list[int] | None, batch: int, steps: int, num_choices: int) -> Tensor:
    """Exponential noise [batch, steps, num_choices] float32 on the CPU, one generator per row.

    The CPU's generator is used on every device, so that a seed means the same noise everywhere. `seeds` None draws
    the seeds from torch's global generator. Raises ValueError where their number is not `batch`.
    """
    if seeds is None:
        seeds = torch.randint(2**62, (batch,))
    if isinstance(seeds, Tensor):
        seeds = seeds.tolist()
    if len(seeds) != batch:
        raise ValueError(f"seeds must hold one integer per row, got {len(seeds)} for {batch} rows")
    noise = torch.empty(batch, steps, num_choices)
    for row, seed in zip(noise, seeds, strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return noise


def choose_tokens(logits: Tensor, temperatures: Tensor, greedy: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Pick one choice per row and say how likely it was.

    The largest of p / e over independent exponential e is a sample from p (the Gumbel-max trick).

    Args:
        logits: [B, V] float32.
        temperatures: [B] float32, above 0.
        greedy: [B] bool; such rows take the largest logit.
        noise: [B, V] from `draw_noise`.

    Returns:
        [B] int64 column, and [B] float32 log-probability under softmax(logits / temperature).
    """
    log_probs = torch.log_softmax(logits / temperatures[:, None], dim=-1)
    sampled = (log_probs - noise.log()).argmax(dim=-1)
    choice = torch.where(greedy, logits.argmax(dim=-1), sampled)
    return choice, log_probs.gather(1, choice[:, None])[:, 0]
