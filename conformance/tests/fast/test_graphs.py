"""A compiled update is entered directly where torch.compile would have let it pass, and nowhere else."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trysquare import _graphs

CONSTANT = torch.tensor(3.0)


def scaled_(x: Tensor, y: Tensor, factor: Tensor, plus: float | None) -> tuple[Tensor, Tensor]:
    """Writes ``x``, returns two results."""
    x.mul_(factor).add_(y)
    if plus is not None:
        x.add_(plus)
    return (x * y).sum(-1), x.sum()


def with_constant(x: Tensor) -> Tensor:
    return x * CONSTANT


def first_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    _graphs.forget()
    with torch.no_grad():
        yield
    _graphs.forget()


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call that goes through torch.compile."""
    calls: list[int] = []
    original = _graphs._Compiled.__call__

    def counted(compiled: Any, *args: Any) -> Any:
        calls.append(len(args))
        return original(compiled, *args)

    monkeypatch.setattr(_graphs._Compiled, "__call__", counted)
    return calls


def sets(count: int, shape: tuple[int, ...] = (3, 4), seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for _ in "xy"] for _ in range(count)]


def shared(factor: float = 0.5, plus: float | None = None) -> tuple[Tensor, float | None]:
    return torch.tensor(factor), plus


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("plus", [None, 0.25])
def test_a_second_call_is_entered_directly_and_gives_the_same(
    count: int, plus: float | None, dispatched: list[int]
) -> None:
    for seed in range(3):
        factor = 0.5 + seed
        given, again = sets(count, seed=seed), sets(count, seed=seed)
        expected = [scaled_(x, y, *shared(factor, plus)) for x, y in given]
        found = _graphs.run_each(scaled_, again, shared(factor, plus))
        for (x, _), (mine, _) in zip(given, again, strict=True):
            torch.testing.assert_close(mine, x)
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, tuple)
            torch.testing.assert_close(one, other)
        if not seed:
            first = len(dispatched)
            assert first == {1: 1, 2: 1, 3: 2, 7: 3}[count]
    assert len(dispatched) == first


def test_other_sizes_go_through_once(dispatched: list[int]) -> None:
    for shape in ((3, 4), (4, 3), (5, 5), (3, 4), (4, 3), (5, 5)):
        ((x, y),) = sets(1, shape)
        before = x.clone()
        ((rows, total),) = _graphs.run_each(scaled_, [[x, y]], shared())
        torch.testing.assert_close(x, before * 0.5 + y)
        torch.testing.assert_close(rows, (x * y).sum(-1))
        torch.testing.assert_close(total, x.sum())
    assert len(dispatched) == 3


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextmanager
def switched(change: Callable[[Any], None], to: Any, back: Any) -> Iterator[None]:
    """One of torch's global settings, changed for a while."""
    change(to)
    try:
        yield
    finally:
        change(back)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "threads": lambda: switched(torch.set_num_threads, (now := torch.get_num_threads()) + 1, now),
    "deterministic algorithms": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "default dtype": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "function mode": lambda: torch.device("cpu"),
    "stance": lambda: torch.compiler.set_stance("force_eager"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_torch_compile_is_asked_in_other_surroundings(name: str, dispatched: list[int]) -> None:
    ((x, y),) = sets(1)
    for _ in range(2):
        _graphs.run_each(scaled_, [[x, y]], shared())
    assert len(dispatched) == 1
    before, given = x.clone(), shared()
    with SURROUNDINGS[name]():
        _graphs.run_each(scaled_, [[x, y]], given)
        torch.testing.assert_close(x, before * 0.5 + y)
    assert len(dispatched) == 2
    if name in {"gradients", "autocast", "function mode", "stance"}:
        _graphs.run_each(scaled_, [[x, y]], shared())
        assert len(dispatched) == 2, "what was known is forgotten for a visitor"


def test_torch_compile_is_asked_where_operations_are_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked only, for torch 2.13 refuses and compiles less for the rest of the process then."""

    class AskedError(Exception):
        pass

    def asked(*_: Any) -> None:
        raise AskedError

    ((x, y),) = sets(1)
    for _ in range(2):
        _graphs.run_each(scaled_, [[x, y]], shared())
    given = shared()
    monkeypatch.setattr(_graphs._Compiled, "__call__", asked)
    with Watching(), pytest.raises(AskedError):
        _graphs.run_each(scaled_, [[x, y]], given)
    _graphs.run_each(scaled_, [[x, y]], shared())


class Marked(Tensor):
    pass


OPERANDS: dict[str, Callable[[], list[Tensor]]] = {
    "not contiguous": lambda: [torch.randn(4, 3).T, torch.randn(3, 4)],
    "a subclass": lambda: [torch.randn(3, 4).as_subclass(Marked), torch.randn(3, 4)],
}


@pytest.mark.parametrize("name", OPERANDS)
def test_torch_compile_is_asked_about_other_operands(name: str, dispatched: list[int]) -> None:
    ((x, y),) = sets(1)
    for _ in range(2):
        _graphs.run_each(scaled_, [[x, y]], shared())
    assert len(dispatched) == 1
    for made in (2, 3):
        given = OPERANDS[name]()
        before = given[0].clone()
        with suppress(RuntimeError) if name == "a subclass" else nullcontext():  # torch 2.6 cannot
            _graphs.run_each(scaled_, [given], shared())
            torch.testing.assert_close(given[0], before * 0.5 + given[1])
        assert len(dispatched) == made


def test_the_way_of_operands_that_share_memory_is_not_gone_again(dispatched: list[int]) -> None:
    """Torch makes a graph of their own for them, if they come first."""
    ((x, y),) = sets(1)
    for made in (1, 2):
        _graphs.run_each(scaled_, [[x, x]], shared())
        assert len(dispatched) == made
    for _ in range(2):
        before = x.clone()
        _graphs.run_each(scaled_, [[x, y]], shared())
        assert len(dispatched) == 3
        torch.testing.assert_close(x, before * 0.5 + y)


def test_a_parameter_is_a_tensor_like_another(dispatched: list[int]) -> None:
    ((x, y),) = sets(1)
    parameter = torch.nn.Parameter(x)
    for _ in range(2):
        before, version = parameter.detach().clone(), parameter._version
        _graphs.run_each(scaled_, [[parameter, y]], shared())
        torch.testing.assert_close(parameter.detach(), before * 0.5 + y)
        assert parameter._version > version, "a backward pass would not notice"
    assert len(dispatched) == 1


@pytest.mark.parametrize("function", [with_constant, first_of])
def test_what_is_no_argument_and_no_output_is_left_to_torch_compile(
    function: Callable[..., Any], dispatched: list[int]
) -> None:
    for made in (1, 2, 3):
        ((x, _),) = sets(1, seed=made)
        (found,) = _graphs.run_each(function, [[x]], ())
        torch.testing.assert_close(found, function(x))
        assert len(dispatched) == made


def test_no_call_keeps_a_tensor_alive() -> None:
    for seed in range(3):
        given = sets(2, seed=seed)
        found = _graphs.run_each(scaled_, given, shared())
        alive = [weakref.ref(tensor) for tensors in (*given, *found) for tensor in tensors]
        del given, found
        gc.collect()
        assert not any(reference() is not None for reference in alive)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    def fails(x: Tensor) -> Tensor:
        return x @ x

    with pytest.raises(Exception, match=r"mat1 and mat2|size|shape"):
        _graphs.run_each(fails, [[torch.ones(3, 4)]], ())
    ((x, y),) = sets(1)
    before = x.clone()
    _graphs.run_each(scaled_, [[x, y]], shared())
    torch.testing.assert_close(x, before * 0.5 + y)


def test_a_torch_that_does_not_tell_is_always_asked(monkeypatch: pytest.MonkeyPatch, dispatched: list[int]) -> None:
    with monkeypatch.context() as without:
        without.delattr(torch._C, "_is_any_autocast_enabled")
        found = _graphs._inside.__wrapped__()
    assert found is None
    monkeypatch.setattr(_graphs, "_inside", lambda: found)
    ((x, y),) = sets(1)
    for made in (1, 2, 3):
        before = x.clone()
        _graphs.run_each(scaled_, [[x, y]], shared())
        torch.testing.assert_close(x, before * 0.5 + y)
        assert len(dispatched) == made


def doubled(x: Tensor) -> Tensor:
    return _twice(x)


def _twice(x: Tensor) -> Tensor:
    return x * 2


def test_a_replaced_function_is_seen_when_torch_compile_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, dispatched: list[int]
) -> None:
    ((x, _),) = sets(1)
    for _ in range(2):
        _graphs.run_each(doubled, [[x]], ())
    assert len(dispatched) == 1
    monkeypatch.setitem(globals(), "_twice", lambda x: x * 3)
    _graphs.ask_again()
    (found,) = _graphs.run_each(doubled, [[x]], ())
    torch.testing.assert_close(found, x * 3)
    assert len(dispatched) == 2
