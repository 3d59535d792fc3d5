"""One decorator that binds an operator's name, its formula, its fake kernel, its gradient and its ONNX translation."""

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A registered operator: call it like the function it was made from."""

    def __init__(self, formula: Callable[..., Any], fake: Callable[..., Any], translate: Callable[..., Any]) -> None:
        self.name = formula.__name__
        self.formula = formula
        self.translate = translate
        self.definition = torch.library.custom_op(f"pe_onnx::{self.name}", formula, mutates_args=())
        self.definition.register_fake(fake)
        self.definition.register_autograd(self._backward, setup_context=_save_inputs)
        self.overload = getattr(torch.ops.pe_onnx, self.name).default
        self.__doc__ = formula.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def _backward(self, ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """The formula's own gradient, recomputed from the inputs: the operators can stand in a module that trains."""
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else other for is_tensor, other in ctx.arguments]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need and isinstance(args[i], torch.Tensor)]

        def outputs(*tensors: torch.Tensor) -> Any:
            filled = list(args)
            for i, tensor in zip(wanted, tensors, strict=True):
                filled[i] = tensor
            return self.formula(*filled)

        pull_back = torch.func.vjp(outputs, *(args[i] for i in wanted))[1]
        result: list[Any] = [None] * len(args)
        for i, gradient in zip(wanted, pull_back(gradients if len(gradients) > 1 else gradients[0]), strict=True):
            result[i] = gradient
        return tuple(result)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.arguments = [(isinstance(x, torch.Tensor), None if isinstance(x, torch.Tensor) else x) for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))


def operator(fake: Callable[..., Any], translate: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated plain formula as ``torch.ops.pe_onnx.<its name>``.

    fake: same signature, returns tensors of the right shape and dtype without computing.
    translate: same signature on ONNX values, returns what the onnxscript function returns.
    """
    return lambda formula: Operator(formula, fake, translate)
