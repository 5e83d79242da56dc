"""How much memory something takes, by torch's own account."""

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], object]) -> int:
    """The most CPU memory that an action holds at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    results = recorded.profiler.kineto_results  # unlike `events()` with every allocation
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def state_bytes(optimizer: Optimizer) -> int:
    """What the memory of all state tensors takes, that which they share counted once."""
    values = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    tensors = [inner for x in values for inner in inner_tensors(x)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def inner_tensors(x: Tensor) -> list[Tensor]:
    """Those that a tensor subclass, such as torchao's coded state, consists of; a plain tensor is its own."""
    if not hasattr(x, "__tensor_flatten__"):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [getattr(x, name) for name in names]
