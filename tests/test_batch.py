"""Every bad tensor gives an error that names the argument, what came and what is taken."""

from typing import Any

import pytest
import torch
from torch import nn

import fomaml_fused as ff

T, S, Q = 2, 3, 4


def call(options: dict[str, Any], changes: dict[str, Any]) -> torch.Tensor:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    classes = options.get("loss") == "cross_entropy"
    batch: dict[str, Any] = {
        "support_x": torch.randn(T, S, 5),
        "support_y": torch.randint(2, (T, S)) if classes else torch.randn(T, S, 2),
        "query_x": torch.randn(T, Q, 5),
        "query_y": torch.randint(2, (T, Q)) if classes else torch.randn(T, Q, 2),
    }
    result: torch.Tensor = ff.FOMAML(model, **options)(**(batch | changes))
    return result


CE = {"loss": "cross_entropy"}


@pytest.mark.parametrize(
    ("options", "changes", "error", "message"),
    [
        ({}, {"support_x": [[1.0]]}, TypeError, "support_x is list; it takes a torch.Tensor"),
        ({}, {"query_y": None}, TypeError, "query_y is NoneType"),
        ({}, {"support_x": torch.randn(S, 5)}, ValueError, r"support_x has shape \[3, 5\]; it takes \[tasks, samples"),
        ({}, {"query_x": torch.randn(T, Q, 4)}, ValueError, "query_x has 4 features; the network takes 5"),
        ({}, {"support_x": torch.randn(T, S, 5).double()}, TypeError, "support_x is torch.float64; it takes .*float32"),
        ({}, {"query_y": torch.randn(T, Q, 2).double()}, TypeError, "query_y is torch.float64"),
        ({}, {"support_y": torch.randn(T, S)}, ValueError, r"support_y has shape \[2, 3\]; mse takes \[tasks"),
        ({}, {"support_y": torch.randn(T, S, 3)}, ValueError, r"support_y has shape \[2, 3, 3\].*\[2, 3, 2\]"),
        ({}, {"support_y": torch.randn(T, S + 1, 2)}, ValueError, "support_y has shape .*, support_x has"),
        ({}, {"query_y": torch.randn(T + 1, Q, 2)}, ValueError, "query_y has shape .*, query_x has"),
        (
            {},
            {"query_x": torch.randn(3, Q, 5), "query_y": torch.randn(3, Q, 2)},
            ValueError,
            "query_x has 3 tasks, support_x has 2",
        ),
        (
            {},
            {"support_x": torch.randn(T, 0, 5), "support_y": torch.randn(T, 0, 2)},
            ValueError,
            "support_x has no sample",
        ),
        (
            {},
            {"support_x": torch.randn(T, S, 5, device="meta")},
            ValueError,
            "support_x is on meta, the model is on cpu",
        ),
        (
            {},
            {"support_weight": torch.ones(T)},
            ValueError,
            r"support_weight has shape \[2\]; it takes \[tasks, shots\]",
        ),
        ({}, {"query_weight": torch.ones(T, S)}, ValueError, r"query_weight has shape \[2, 3\].*\[2, 4\]"),
        ({}, {"task_weight": torch.ones(3)}, ValueError, r"task_weight has shape \[3\]; it takes \[tasks\], \[2\]"),
        ({}, {"task_weight": torch.ones(T, dtype=torch.int64)}, TypeError, "task_weight is torch.int64"),
        ({}, {"task_weight": 0.5}, TypeError, "task_weight is float"),
        ({}, {"reduction": "average"}, ValueError, "reduction is 'average'; it takes one of mean, sum, none"),
        (CE, {"support_y": torch.full((T, S), 2)}, ValueError, "support_y holds classes 2 to 2; .*2 outputs"),
        (CE, {"query_y": torch.full((T, Q), -1)}, ValueError, "query_y holds classes -1 to -1"),
        (CE, {"query_y": torch.zeros(T, Q)}, TypeError, "query_y is torch.float32; it takes torch.int64"),
        (CE, {"query_y": torch.zeros(T, Q, 2)}, ValueError, "cross_entropy takes class indices"),
        ({"loss": lambda z, y: (z - y).square().mean()}, {}, ValueError, r"loss gave a tensor of shape \[\]"),
    ],
)
def test_bad_batches(options: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(options, changes)


def test_a_good_batch_passes_this_table() -> None:
    assert call({}, {}).isfinite()
    assert call(CE, {}).isfinite()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_tasks_and_no_queries_follow_torch(backend: str) -> None:
    options = {"backend": backend}
    nothing = {"query_x": torch.randn(T, 0, 5), "query_y": torch.randn(T, 0, 2)}
    assert call(options, nothing).isnan()
    none = {name: t[:0] for name, t in nothing.items()} | {
        "support_x": torch.randn(0, S, 5),
        "support_y": torch.randn(0, S, 2),
    }
    assert call(options, none).isnan()
    assert call(options, none | {"reduction": "sum"}) == 0
    assert call(options, none | {"reduction": "none"}).shape == (0,)


def test_gradients_of_nothing_are_zero() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    loss = ff.FOMAML(model)(torch.randn(T, S, 5), torch.randn(T, S, 2), torch.randn(T, 0, 5), torch.randn(T, 0, 2))
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_empty_support_set_is_fine_where_no_step_reads_it() -> None:
    empty = {"support_x": torch.randn(T, 0, 5), "support_y": torch.randn(T, 0, 2)}
    assert call({"steps": 0}, empty).isfinite()


def test_a_mask_is_a_weight_of_zero_or_one() -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    batch = {
        "support_x": torch.randn(T, S, 5),
        "support_y": torch.randn(T, S, 2),
        "query_x": torch.randn(T, Q, 5),
        "query_y": torch.randn(T, Q, 2),
    }
    torch.manual_seed(0)
    masked = call({}, batch | {"support_weight": mask})
    torch.manual_seed(0)
    torch.testing.assert_close(call({}, batch | {"support_weight": mask.float()}), masked)
