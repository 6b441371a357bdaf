"""When a gradient may be added to a weight's own where it is made, not handed to autograd."""

import torch
from torch.distributed.tensor import DTensor


def adds_only(weight: torch.Tensor) -> bool:
    """True if all that this backward pass would do with a gradient of `weight` is to add it to `weight.grad`.

    To be asked inside `backward`. Of a weight that two layers share autograd keeps the first gradient until it has
    the second: through the whole backward pass where they are embedding and head.
    """
    total = weight.grad if weight.is_leaf else None
    if total is None or isinstance(total, DTensor) or total.dtype != weight.dtype:
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:  # somebody waits for the gradient itself
        return False
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # `torch.autograd.grad` returns this gradient and leaves `weight.grad` alone
        return False
