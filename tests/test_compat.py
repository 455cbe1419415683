"""State dicts under learn2learn's names: by the names that it gives, and with the library itself where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused.compat import learn2learn_state_dict, load_learn2learn_state_dict


def network(seed: int = 0, hidden: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 2, bias=False))


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]


def meta_sgd(seed: int = 0) -> ff.MetaSGD:
    """With rates that differ."""
    meta = ff.MetaSGD(network(seed))
    with torch.no_grad():
        for i, rates in enumerate(meta.inner_lr.values):
            rates.add_(torch.rand_like(rates) + i)
    return meta


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_names_are_learn2learns() -> None:
    model = network()
    state = learn2learn_state_dict(ff.FOMAML(model))
    assert same(state, {f"module.{name}": p.detach() for name, p in model.named_parameters()})
    assert list(state) == [f"module.{name}" for name in NAMES]
    rates = {name: value for name, value in learn2learn_state_dict(meta_sgd()).items() if name.startswith("lrs")}
    assert list(rates) == [f"lrs.{i}" for i in range(5)]
    assert [list(value.shape) for value in rates.values()] == [list(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("make", [lambda seed: ff.FOMAML(network(seed)), meta_sgd], ids=["FOMAML", "MetaSGD"])
def test_what_is_written_can_be_read(make: Any) -> None:
    meta, other = make(1), make(2)
    assert not same(meta.state_dict(), other.state_dict())
    load_learn2learn_state_dict(other, learn2learn_state_dict(meta))
    assert same(meta.state_dict(), other.state_dict())


@pytest.mark.parametrize("algorithm", ["MAML", "MetaSGD"])
def test_learn2learn_itself_reads_and_writes_it(algorithm: str) -> None:
    l2l = pytest.importorskip("learn2learn")
    meta = meta_sgd(1) if algorithm == "MetaSGD" else ff.FOMAML(network(1))
    theirs = getattr(l2l.algorithms, algorithm)(network(2), lr=0.01)
    theirs.load_state_dict(learn2learn_state_dict(meta))
    assert same(dict(theirs.state_dict()), learn2learn_state_dict(meta))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.rand_like(parameter))
    load_learn2learn_state_dict(meta, theirs.state_dict())
    assert same(dict(theirs.state_dict()), learn2learn_state_dict(meta))
    if algorithm == "MetaSGD":  # each rate is that of the same element
        named = dict(zip(dict(theirs.module.named_parameters()), theirs.lrs, strict=True))
        rates = dict(zip(meta.adapted_names(), meta.inner_lr.values, strict=True))
        assert same(named, rates)


def test_every_wrong_name_is_named_and_nothing_copied() -> None:
    meta = ff.FOMAML(network(1))
    before = {name: value.clone() for name, value in meta.state_dict().items()}
    state: dict[str, Any] = learn2learn_state_dict(ff.FOMAML(network(2)))
    del state["module.0.bias"]
    state |= {"0.bias": torch.zeros(4), "module.1.bias": torch.zeros(5), "module.3.weight": [0.0]}
    with pytest.raises(ValueError, match="state is not that of learn2learn") as caught:
        load_learn2learn_state_dict(meta, state)
    for words in (
        "it lacks module.0.bias",
        "it has 0.bias, which meta has no place for",
        "its module.1.bias is [5], which takes [4]",
        "its module.3.weight is list, which takes a tensor",
    ):
        assert words in str(caught.value)
    assert same(meta.state_dict(), before)


def test_rates_of_one_kind_do_not_become_the_other() -> None:
    with pytest.raises(ValueError, match=r"it has lrs\.0, which meta has no place for"):
        load_learn2learn_state_dict(ff.FOMAML(network()), learn2learn_state_dict(meta_sgd()))
    with pytest.raises(ValueError, match=r"it lacks lrs\.4"):
        load_learn2learn_state_dict(meta_sgd(), learn2learn_state_dict(ff.FOMAML(network())))


@pytest.mark.parametrize(
    "options",
    [{"learn_lr": "layer"}, {"learn_lr": "element", "positive_lr": "clamp"}, {"learn_lr": "element", "adapt": "head"}],
    ids=str,
)
def test_rates_that_learn2learn_has_no_place_for(options: dict[str, Any]) -> None:
    meta = ff.FOMAML(network(), **options)
    with pytest.raises(ValueError, match=f"meta has learn_lr='{options['learn_lr']}'.* learn2learn takes"):
        learn2learn_state_dict(meta)
    with pytest.raises(ValueError, match="learn2learn takes no learned rates, or as MetaSGD"):
        load_learn2learn_state_dict(meta, {})


def test_a_state_in_place_of_the_module_is_told() -> None:
    with pytest.raises(TypeError, match="meta is dict; it takes a FOMAML"):
        learn2learn_state_dict({"module.0.weight": torch.zeros(1)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="meta is Sequential; it takes a FOMAML"):
        load_learn2learn_state_dict(network(), {})  # type: ignore[arg-type]
