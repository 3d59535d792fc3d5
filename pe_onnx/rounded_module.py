"""PyTorch's side with the weights of a quantized bundle: what the rounding costs is another question than parity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from pe_onnx.bundle import ENCODER, Bundle
from pe_onnx.errors import CheckpointError, needs

with needs("parity", "'pe-onnx[export]'"):
    import onnx_ir as ir
    import torch

from pe_onnx.external_weights import load
from pe_onnx.passes.quantized_weights import rounded_parts

Array = np.ndarray[Any, Any]
Hold = Callable[[Any], Any]
"""A module to the same with other weights."""


def as_it_is(module: Any) -> Any:
    return module


def holder(bundle: Bundle) -> Hold:
    """What gives a module the bundle's weights where these are rounded, in place; otherwise nothing is done."""
    return as_it_is if bundle.quantization is None else lambda module: round_weights(module, bundle)


def of_caller(module: Any, hold: Hold) -> Any:
    """The same for a module that is someone else's, and stays as it is."""
    return module if hold is as_it_is else hold(copy.deepcopy(module))


@torch.no_grad()
def round_weights(module: Any, bundle: Bundle) -> Any:
    """Copy every rounded weight of the bundle into the module's parameter of its name, one after another.

    A weight's name in the file is the parameter's, behind the name of a wrapper or two. Tied parameters are one, but
    where only one of an encoder-decoder's graphs has it rounded. Raises CheckpointError for a weight that the module
    has not, or has in another shape.
    """
    for name, _, make, parameter in matched(module, bundle):
        values = make()
        parameter.copy_(torch.from_numpy(np.array(oriented(values, parameter, name))))
    return module


def matched(module: Any, bundle: Bundle) -> Iterator[tuple[str, str, Callable[[], Array], torch.Tensor]]:
    """Each rounded weight: its name, the graph, a function to its values ``[N, K]``, and the module's parameter."""
    graphs = {file: ir.load(bundle.folder / file).graph for file in bundle.graphs}
    weights = {file: rounded_parts(load(bundle.folder / file)) for file in graphs}
    for name in weights.get(ENCODER, {}):
        _untie(module, name, {plain for file in graphs if file != ENCODER for plain in graphs[file].initializers})
    for name in graphs[ENCODER].initializers if ENCODER in graphs else ():
        if name not in weights[ENCODER]:
            _untie(module, name, {rounded for file in graphs if file != ENCODER for rounded in weights[file]})
    for file, found in weights.items():
        for name, make in found.items():
            path = _path(module, name)
            if path is None:
                raise CheckpointError(
                    f"the bundle's rounded weight {name} is no parameter of {type(module).__name__}: the reference is "
                    f"another model's"
                )
            yield name, file, make, module.get_parameter(path)


def oriented(values: Array, parameter: torch.Tensor, name: str) -> Array:
    """Rounded values ``[N, K]`` as the parameter holds them: some are ``[K, N]``."""
    shape = tuple(parameter.shape)
    if shape not in (values.shape, values.shape[::-1]):
        raise CheckpointError(
            f"the bundle's rounded weight {name} is {list(values.shape)} and the reference's {list(shape)}: the "
            f"reference is another model's"
        )
    if shape != values.shape:
        return values.T
    if values.shape[0] != values.shape[1]:
        return values
    held = parameter.detach().float().numpy()
    return values if np.abs(held - values).sum() <= np.abs(held - values.T).sum() else values.T


def _path(module: Any, name: str) -> str | None:
    """A parameter's name in the module: that of the file without a wrapper of either."""
    held: Mapping[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for tail in (name, name.partition(".")[2]):
        if not tail or tail in held:
            return tail or None
        behind = [path for path in held if path.endswith(f".{tail}")]
        if behind and len({held[path].data_ptr() for path in behind}) == 1:
            return behind[0]
    return None


def _untie(module: Any, name: str, others: set[str]) -> None:
    """Give the encoder a parameter of its own where another graph has the tied one otherwise."""
    path = _path(module, name)
    if path is None:
        return
    place = module.get_parameter(path).data_ptr()
    paths = filter(None, (_path(module, other) for other in others))
    if not any(module.get_parameter(tied).data_ptr() == place for tied in paths):
        return
    *above, child, attribute = path.split(".")
    parent = module.get_submodule(".".join(above))
    own = copy.copy(getattr(parent, child))
    own._parameters = {**own._parameters, attribute: torch.nn.Parameter(module.get_parameter(path).detach().clone())}
    setattr(parent, child, own)
