"""Where values lie in packed form: the plane of each, and one geometry for all maps of a size."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from tvm import relax

from pumice.passes.fusion import Fused, Graph
from pumice.passes.layers import Layer
from pumice.passes.rewriting import shape_of
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places

Plane = tuple[int, int, int]  # batch, height, width
POOLS = ("nn.max_pool2d", "nn.avg_pool2d")


def is_map(var: relax.Expr) -> bool:
    """Whether a value is a feature map, NCHW; otherwise channels are its last axis."""
    return len(shape_of(var)) == 4


def plane_of(var: relax.Expr) -> tuple[Plane, int]:
    """The plane of a value's positions, and its channels."""
    shape = list(shape_of(var))
    if is_map(var):
        n, c, h, w = shape
        return ((1, 1, n) if h == w == 1 else (n, h, w)), c
    return (1, 1, int(np.prod(shape[:-1]))), shape[-1]


def window_of(call: relax.Call, kernel: tuple[int, int]) -> Window:
    """The taps of a convolution or pooling call."""
    attrs = call.attrs
    padding = [int(p) for p in attrs.padding]
    stride = [int(s) for s in attrs.strides]
    dilation = [int(d) for d in attrs.dilation]
    if kernel == (1, 1) and not any(padding) and is_pixel(call.args[0]):
        return Window(kernel)  # nowhere to stride to; pixels of a batch lie side by side
    return Window(kernel, (stride[0], stride[-1]), (dilation[0], dilation[-1]), (padding[0], padding[1 % len(padding)]))


def plan_geometry(graph: Graph, chains: Iterable[Fused]) -> dict[Plane, Geometry]:
    """One geometry for each size of map: with the widest padding that any reader of such a map needs.

    So all maps of one size lie alike, and residual adds and chains of kernels never have to move anything.
    """
    geometries: dict[Plane, Geometry] = {}
    readers = [(c.layer.data, c.layer.var, c.layer.call) for c in chains if c.layer.operator == "conv2d"]
    readers += [(v.args[0], var, v) for var, v in graph.flow.bindings if graph.flow.op(var) in POOLS and is_map(var)]
    for source, target, call in readers:
        if not is_map(source) or is_pixel(target):
            continue
        need = window_reach(source, target, _window(call))
        plane = plane_of(target)[0]
        old = geometries.get(plane, Geometry(*plane))
        geometries[plane] = Geometry(*plane, max(old.pad_h, need[0]), max(old.pad_w, need[1]))
    return geometries


def expected_places(layer: Layer) -> Places:
    """Where a layer would read and write if it were alone in its network."""
    if layer.operator == "linear":
        geometry = Geometry.of_tokens(math.prod(shape_of(layer.var)[:-1]))
        return Places(Window((1, 1)), geometry, geometry)
    window = _window(layer.call)
    reach = (0, 0) if is_pixel(layer.var) else window_reach(layer.data, layer.var, window)
    geometry = Geometry(*plane_of(layer.var)[0], *reach)
    return Places(window, geometry, geometry)


def window_reach(source: relax.Expr, target: relax.Expr, window: Window) -> tuple[int, int]:
    """The padding, in rows and columns, that ``window`` must find around ``source`` to make ``target``."""
    sizes = [(shape_of(v)[2], shape_of(v)[3]) for v in (source, target)]
    return window.reach(sizes[0], sizes[1])


def is_pixel(var: relax.Expr) -> bool:
    """Whether a map is a single pixel: batches of these lie side by side, without padding."""
    return shape_of(var)[2:] == (1, 1)


def is_channels_last(var: relax.Expr) -> bool:
    """Whether the plain form has channels innermost: tokens, and maps of a single pixel."""
    return not is_map(var) or is_pixel(var)


def of_batch(geometry: Geometry, batch: int) -> Geometry:
    """The inverse of ``Geometry.normalized``: single pixels that lie like tokens, as a batch again."""
    return geometry if geometry.batch == batch else Geometry(batch, 1, 1)


def _window(call: relax.Call) -> Window:
    kernel = shape_of(call.args[1])[2:] if len(call.args) > 1 else call.attrs.pool_size
    return window_of(call, (int(kernel[0]), int(kernel[-1])))
