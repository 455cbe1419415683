"""The module as a user holds it: training, state dicts, copies, a backbone in front."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml_fused as ff

from .cases import Case, relative_error

CASE = Case(widths=(3, 17, 5), loss="cross_entropy", steps=3)


def module(dtype: torch.dtype = torch.float64) -> ff.FOMAML:
    return ff.FOMAML(CASE.model(dtype), **CASE.options())


def test_a_training_loop_follows_the_oracles() -> None:
    ours, theirs = CASE.model(torch.float64), CASE.model(torch.float64)
    meta = ff.FOMAML(ours, **CASE.options())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (ours, theirs)]
    for seed in range(20):
        batch = Case(**{**vars(CASE), "seed": seed}).batch(torch.float64)
        for optimizer, loss in zip(
            optimizers, (meta(**batch), ff.reference.meta_loss(theirs, **batch, **CASE.oracle_options())), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_every_backend_gives_the_same(backend: str) -> None:
    batch = CASE.batch(torch.float64)
    meta = ff.FOMAML(CASE.model(torch.float64), **CASE.options(), backend=backend)
    torch.testing.assert_close(meta(**batch), module()(**batch))
    names = ("support_x", "support_y")
    support = {name: batch[name] for name in names}
    torch.testing.assert_close(
        meta.predict(**support, query_x=batch["query_x"]), module().predict(**support, query_x=batch["query_x"])
    )


def test_a_backbone_learns_through_the_fused_head() -> None:
    """ANIL: convolutional features, an adapted head; the backbone gets its gradient through the query features."""
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).double()
    head = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    images = torch.rand(2, 4, 5, 1, 8, 8, dtype=torch.float64)  # support and query images of T = 4 tasks
    sy, qy = torch.randint(3, (2, 4, 5))
    anil = ff.ANIL(head, lr=0.3, steps=3, loss="cross_entropy")
    sx, qx = (backbone(x.flatten(0, 1)).view(4, 5, -1) for x in images)
    parameters = [*backbone.parameters(), *head.parameters()]
    actual = torch.autograd.grad(anil(sx, sy, qx, qy), parameters, retain_graph=True)
    reference = ff.reference.meta_loss(head, sx, sy, qx, qy, lr=0.3, steps=3, loss="cross_entropy", adapt="head")
    for a, b in zip(actual, torch.autograd.grad(reference, parameters), strict=True):
        assert relative_error(a, b) < 1e-10
    assert all(g.any() for g in actual)

    optimizer = torch.optim.Adam(parameters, lr=0.03)
    losses = []
    for _ in range(30):
        sx, qx = (backbone(x.flatten(0, 1)).view(4, 5, -1) for x in images)
        loss = anil(sx, sy, qx, qy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_only_the_head_moves_under_anil() -> None:
    model = CASE.model(torch.float64)
    batch = CASE.batch(torch.float64)
    weights = ff.ANIL(model, lr=0.1, loss="cross_entropy").adapt(batch["support_x"], batch["support_y"]).weights()
    for name, before in model.named_parameters():
        assert torch.equal(weights[name], before.expand_as(weights[name])) == name.startswith("0.")


def test_state_dicts_are_the_plain_models() -> None:
    meta, plain = module(), CASE.model(torch.float64)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1.0)
    assert list(meta.state_dict()) == list(plain.state_dict())
    meta.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(meta.parameters(), plain.parameters(), strict=True))
    CASE.model(torch.float64).load_state_dict(meta.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        meta.load_state_dict({"0.weight": plain[0].weight})


def test_state_dicts_of_a_module_around_it() -> None:
    outer = nn.ModuleDict({"backbone": nn.Linear(2, 3), "head": module()})
    state = {name: t.clone() + 1 for name, t in outer.state_dict().items()}
    assert [name for name in state if name.startswith("head")] == [
        f"head.{n}" for n in CASE.model(torch.float64).state_dict()
    ]
    outer.load_state_dict(state)
    assert all(torch.equal(outer.state_dict()[name], t) for name, t in state.items())


def test_a_model_whose_own_child_is_called_model() -> None:
    from collections import OrderedDict

    model = nn.Sequential(OrderedDict(model=nn.Linear(3, 4), act=nn.ReLU(), head=nn.Linear(4, 2)))
    meta = ff.FOMAML(model)
    assert list(meta.state_dict()) == list(model.state_dict())
    meta.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_are_whole_and_apart(way: str) -> None:
    meta, batch = module(), CASE.batch(torch.float64)
    if way == "deepcopy":
        twin = copy.deepcopy(meta)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(meta))
    else:
        buffer = io.BytesIO()
        torch.save(meta, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(twin(**batch), meta(**batch))
    twin(**batch).backward()
    assert all(p.grad is None for p in meta.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    twin.load_state_dict({name: torch.zeros_like(t) for name, t in twin.state_dict().items()})
    assert meta(**batch) != twin(**batch)


def test_moving_to_another_dtype() -> None:
    meta = module(torch.float32).to(torch.float64)
    assert meta(**CASE.batch(torch.float64)).dtype == torch.float64
    with pytest.raises(TypeError, match=r"support_x is torch\.float32"):
        meta(**CASE.batch(torch.float32))


def test_reductions_are_those_of_cross_entropy() -> None:
    meta, batch = module(), CASE.batch(torch.float64)
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    per_task = meta(**batch, reduction="none")
    torch.testing.assert_close(meta(**batch), per_task.mean())
    torch.testing.assert_close(meta(**batch, reduction="sum"), per_task.sum())
    torch.testing.assert_close(meta(**batch, reduction="none", task_weight=weight), per_task * weight)
    torch.testing.assert_close(meta(**batch, reduction="sum", task_weight=weight), (per_task * weight).sum())
    torch.testing.assert_close(meta(**batch, task_weight=weight), (per_task * weight).sum() / weight.sum())


def test_a_loss_by_hand_on_adapted_outputs_is_the_modules_own() -> None:
    meta, batch = module(), CASE.batch(torch.float64)
    outputs = meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])
    by_hand = F.cross_entropy(outputs.flatten(0, 1), batch["query_y"].flatten())
    torch.testing.assert_close(by_hand, meta(**batch))


def test_functional_call_swaps_parameters() -> None:
    meta, batch = module(), CASE.batch(torch.float64)
    other = {name: p.detach() + 0.1 for name, p in meta.named_parameters()}
    actual = torch.func.functional_call(meta, other, kwargs=batch)
    with torch.no_grad():
        for p in meta.parameters():
            p.add_(0.1)
    torch.testing.assert_close(actual, meta(**batch))


def test_a_model_changed_behind_the_modules_back_is_an_error() -> None:
    meta, batch = module(), CASE.batch(torch.float64)
    meta.model[2] = nn.Linear(17, 5).double()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="make a new FOMAML"):
        meta(**batch)


def test_a_model_of_two_dtypes_is_an_error() -> None:
    meta, batch = module(), CASE.batch(torch.float64)
    meta.model[2].float()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"model has parameters of torch\.float64 on cpu and of torch\.float32"):
        meta(**batch)


@pytest.mark.parametrize(
    ("preset", "option"), [(ff.ANIL, "adapt"), (ff.MetaSGD, "learn_lr"), (ff.Reptile, "outer")], ids=str
)
def test_presets_do_not_take_what_they_set(preset: type[ff.FOMAML], option: str) -> None:
    with pytest.raises(TypeError, match=f"{preset.__name__} is FOMAML with {option}="):
        preset(CASE.model(torch.float64), **{option: "all"})  # type: ignore[arg-type]


def test_repr_says_what_is_computed() -> None:
    assert "3-17-5 tanh, cross_entropy, K=3" in repr(module())


@pytest.mark.parametrize("form", ["primal", "dual", "dual:1"])
@pytest.mark.compiles
def test_the_compiled_step_gives_the_same(form: str) -> None:
    torch.use_deterministic_algorithms(False)  # poisoned memory costs the compiler minutes
    batch = CASE.batch(torch.float64)
    results = []
    for compiled in (False, True):
        meta = ff.FOMAML(CASE.model(torch.float64), **CASE.options(), compile=compiled)
        with ff.override(forms=(form, form), chunk=2):  # and a last chunk of another size
            loss = meta(**batch)
            results.append([loss, *torch.autograd.grad(loss, [*meta.parameters(), batch["query_x"]])])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-12
