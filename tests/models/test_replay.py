"""Passes that are recorded once and replayed."""

import pytest
import torch
from torch import nn

from tests.replay_helpers import pretend_capture
from vlarl_rllib.models.replay import EAGER_CALLS, GraphCapture, Replayed, graph_rows

ROWS = (3, 3, 5, 3, 5, 3, 5, 3)


def recorded(model: nn.Linear, device: torch.device) -> Replayed:
    def run(given: dict[str, torch.Tensor], scaled: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = (model(given["x"]) * scaled["by"]).square().sum()
        loss.backward()
        return {"loss": loss.detach()}

    return Replayed(run, GraphCapture() if device.type == "cuda" else pretend_capture(model))


def test_what_is_forgotten_is_recorded_anew() -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
    model = nn.Linear(4, 2).to("cuda")
    step = recorded(model, torch.device("cuda"))
    given = {"x": torch.ones(3, 4, device="cuda")}, {"by": torch.ones((), device="cuda")}
    losses = [step(*given)["loss"] for _ in range(EAGER_CALLS + 2)]
    model.zero_grad(set_to_none=True)
    step.forget(GraphCapture())
    losses += [step(*given)["loss"] for _ in range(EAGER_CALLS + 2)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert model.bias.grad is not None and model.bias.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_replays_are_the_passes_themselves_and_gradients_add_up_in_place(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
    device = torch.device(kind)
    torch.manual_seed(0)
    plain, model = nn.Linear(4, 2).to(device), nn.Linear(4, 2).to(device)
    model.load_state_dict(plain.state_dict())
    step, losses, expected = recorded(model, device), [], []
    for rows in ROWS:
        x, by = torch.randn(rows, 4, device=device), torch.randn((), device=device)
        losses.append(step({"x": x}, {"by": by})["loss"])
        loss = (plain(x) * by).square().sum()
        loss.backward()
        expected.append(loss.detach())
    assert torch.equal(torch.stack(losses), torch.stack(expected)), "none has been overwritten"
    assert plain.weight.grad is not None and model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)
    shapes = [*step._shapes.values()]
    assert [shape.calls for shape in shapes] == [5, 3] and all(shape.replay for shape in shapes)


def test_the_first_calls_run_as_they_are() -> None:
    model = nn.Linear(4, 2)
    step = recorded(model, torch.device("cpu"))
    for _ in range(EAGER_CALLS):
        step({"x": torch.ones(1, 4)}, {"by": torch.ones(())})
    (shape,) = step._shapes.values()
    assert shape.replay is None and model.weight.grad is not None


def test_sizes_of_graphs_are_few_and_near() -> None:
    assert [graph_rows(count, 64) for count in (1, 2, 3, 5, 9, 16, 17, 33, 64)] == [1, 2, 4, 8, 16, 16, 32, 48, 64]
    assert graph_rows(17, 20) == 20, "no graph is larger than what comes at once"
