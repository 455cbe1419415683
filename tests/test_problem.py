"""What a user may ask for, and the error for what they may not."""

from typing import Any

import pytest
import torch
from torch import nn

import fomaml_fused as ff
from fomaml_fused.inner import InnerLoop, adapted_parts, inner_rates
from fomaml_fused.network import read_network
from fomaml_fused.problem import Activation, Layer, Network

MLP = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
shared = nn.Linear(3, 3)
tied_bias = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
tied_bias[1].bias = tied_bias[0].bias
hooked = nn.Sequential(nn.Linear(3, 2))
hooked[0].register_forward_hook(lambda *_: None)


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": float("nan")}, ValueError, "lr is nan; it takes finite"),
        ({"lr": [0.1, float("inf")]}, ValueError, "lr is .*finite"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'"),
        ({"lr": [0.1, 0.2, 0.3]}, ValueError, r"lr has shape \[3\].*\[layers\] = \[2\]"),
        ({"steps": -1}, ValueError, "steps is -1"),
        ({"steps": 1.5}, TypeError, "steps is 1.5"),
        ({"steps": True}, TypeError, "steps is True"),
        ({"momentum": -0.1}, ValueError, "momentum is -0.1"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay is inf"),
        ({"loss": "crossentropy"}, ValueError, "loss is 'crossentropy'; it takes one of mse"),
        ({"loss": 3}, TypeError, "loss is int"),
        ({"outer_loss": 3}, TypeError, "outer_loss is int"),
        ({"adapt": "tail"}, ValueError, "adapt is 'tail'"),
        ({"adapt": [0, 2]}, ValueError, "adapt names layer 2; the network has layers 0 to 1"),
        ({"adapt": 0}, TypeError, "adapt is 0"),
        ({"adapt": [True, False]}, TypeError, "adapt is .*True.* layer indices"),
        ({"adapt": [0.5]}, TypeError, "adapt is .*0.5"),
        ({"adapt": ["head"]}, ValueError, "adapt names 'head'; the model has the parameters 0.weight, 0.bias"),
        ({"adapt": [0, "0.weight"]}, TypeError, "adapt is .*layer indices"),
        ({"lr": torch.tensor(0.1, requires_grad=True)}, TypeError, "lr asks for a gradient"),
        ({"momentum": None}, TypeError, "momentum is None; it takes a number"),
        ({"outer_loss": "foo"}, ValueError, "outer_loss is 'foo'; it takes one of mse"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'; it takes one of auto"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.FOMAML(MLP, **options)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)), TypeError, r"model\[1\] is Dropout.*Linear, "),
        (nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 1, 1))), TypeError, r"model\[0.1\] is Conv1d"),
        (nn.Conv1d(1, 1, 1), TypeError, r"model\[0\] is Conv1d"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), ValueError, r"model\[0\] is ReLU; the first layer"),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Tanh()), ValueError, r"model\[2\] is Tanh, behind another"),
        (nn.Sequential(shared, nn.ReLU(), shared), ValueError, r"model\[2\] shares a parameter"),
        (nn.Sequential(nn.Linear(3, 3), tied_bias), ValueError, r"model\[1.1\] shares a parameter"),
        (Doubled(nn.Linear(3, 2)), TypeError, r"model\[0\] is Doubled"),
        (hooked, TypeError, "has forward hooks"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), ValueError, "layer 0 gives 4 features, layer 1 takes 5"),
        (nn.Sequential(), ValueError, "network has no layer"),
    ],
)
def test_bad_models(model: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.FOMAML(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activation("swish"), "activation is 'swish'"),
        (lambda: Activation("elu"), r"'elu' takes parameters \('alpha',\)"),
        (lambda: Layer(0, 3), "in_features is 0"),
        (lambda: ff.Loss("huber", delta=0.0), "delta is 0.0"),
        (lambda: ff.Loss("cross_entropy", label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: ff.Loss("callable"), "takes a function exactly"),
        (lambda: InnerLoop(((0.1,),), ((), ())), "lr has 1 rates a step"),
    ],
)
def test_bad_parts(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sequential_is_read_as_it_runs() -> None:
    act = nn.ReLU(inplace=True)
    model = nn.Sequential(
        nn.Linear(3, 4),
        act,
        nn.Sequential(nn.Linear(4, 5, bias=False), act),
        nn.Identity(),
        nn.Linear(5, 2),
        ff.Sine(7),
    )
    network, blocks = read_network(model)
    relu = Activation("relu")
    assert network == Network(
        (Layer(3, 4, True, relu), Layer(4, 5, False, relu), Layer(5, 2, True, Activation("sine", (7.0,))))
    )
    assert [block.linear for block in blocks] == [model[0], model[2][0], model[4]]  # type: ignore[index]
    assert read_network(nn.Linear(3, 2))[0] == Network((Layer(3, 2),))


def test_a_problem_is_a_key() -> None:
    one, same, other = (
        ff.FOMAML(MLP, lr=0.1, steps=2),
        ff.FOMAML(MLP, lr=[[0.1], [0.1]], steps=2),
        ff.FOMAML(MLP, lr=0.2, steps=2),
    )
    assert one.problem == same.problem
    assert hash(one.problem) == hash(same.problem)
    assert one.problem != other.problem


def test_rates_broadcast_to_steps_and_layers() -> None:
    assert inner_rates(0.5, 2, 3) == ((0.5,) * 3,) * 2
    assert inner_rates([1.0, 2.0, 3.0], 2, 3) == ((1.0, 2.0, 3.0),) * 2
    assert inner_rates(torch.tensor([[1.0], [2.0]]), 2, 3) == ((1.0,) * 3, (2.0,) * 3)
    assert inner_rates(0.5, 0, 3) == ()


def test_adapt_names_layers_and_parameters() -> None:
    layers = [{"weight": "0.weight", "bias": "0.bias"}, {"weight": "2.weight"}, {"weight": "20.weight"}]
    values = {name: torch.zeros(3) for names in layers for name in names.values()}
    whole = [tuple(names) for names in layers]

    def parts(adapt: Any) -> list[tuple[str, ...]]:
        return list(adapted_parts(adapt, layers, values))

    assert parts("all") == whole
    assert parts("head") == [(), (), whole[2]]
    assert parts("body") == [*whole[:2], ()]
    assert parts([-1, 0]) == [whole[0], (), whole[2]]
    assert parts([]) == [(), (), ()]
    assert parts(["0.bias"]) == [("bias",), (), ()]
    assert parts(["2", "0.weight"]) == [("weight",), ("weight",), ()]
    assert parts(lambda name, p: "weight" in name and p.dim() == 1) == [("weight",), ("weight",), ("weight",)]
    assert adapted_parts("body", layers[:1], values) == ((),)
