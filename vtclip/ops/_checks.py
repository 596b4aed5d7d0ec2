# SPDX-License-Identifier: Apache-2.0
"""Validators with one message format: operator, argument, what was wanted, what it got."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect_tensors(op: str, **specs: tuple[Tensor, str]) -> dict[str, int]:
    """`expect_floats` and `expect_shape` of all tensors of a call."""
    expect_floats(op, {name: tensor for name, (tensor, _) in specs.items()})
    return expect_shape(op, specs)


def expect_floats(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Every argument is a dense tensor of a float dtype, all on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}")
        if tensor.dtype not in FLOATS:
            wanted = ", ".join(_dtype_name(dtype) for dtype in FLOATS)
            raise TypeError(
                f"{op}: {name} must be one of {wanted}, got {_dtype_name(tensor.dtype)}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} like {first_name}, got {tensor.device}"
            )


def expect_mask(op: str, mask: Tensor, like: Tensor) -> None:
    """A boolean tensor on the device of `like`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: key_mask must be a Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: key_mask must be bool (True = attend), got {_dtype_name(mask.dtype)}"
        )
    if mask.device != like.device:
        raise ValueError(f"{op}: key_mask must be on {like.device}, got {mask.device}")


def expect_shape(op: str, specs: Mapping[str, tuple[Tensor, str]]) -> dict[str, int]:
    """Shapes fit specs such as "B|1 H K d"; a letter means one size, "B|1" that size or 1.

    Returns the size of every letter; B is 1 where it was seen only as "B|1" of size 1.
    """
    sizes: dict[str, int] = {}
    fits = True
    for tensor, spec in specs.values():
        letters = spec.split()
        if tensor.dim() != len(letters):
            fits = False
            continue
        for letter, size in zip(letters, tensor.shape, strict=True):
            if letter == "B|1":
                if size == 1:
                    continue
                letter = "B"
            if sizes.setdefault(letter, size) != size:
                fits = False
    if not fits:
        _explain_shape(op, specs, sizes)
    sizes.setdefault("B", 1)
    return sizes


def _explain_shape(op: str, specs: Mapping[str, tuple[Tensor, str]], sizes: dict[str, int]) -> None:
    """Raises for the first argument that does not fit `sizes`."""
    for argument, (tensor, spec) in specs.items():
        letters = spec.split()
        fits = tensor.dim() == len(letters) and all(
            sizes.get(letter.partition("|")[0], 1) == size or (letter.endswith("|1") and size == 1)
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            named = ", ".join(letters)
            if tensor.dim() != len(letters):
                raise ValueError(
                    f"{op}: {argument} must have {len(letters)} dimensions [{named}], "
                    f"got {list(tensor.shape)}"
                )
            wanted = ", ".join(
                str(sizes.get(letter.partition("|")[0], 1)) + ("|1" if "|" in letter else "")
                for letter in letters
            )
            raise ValueError(
                f"{op}: {argument} must be [{named}] = [{wanted}], got {list(tensor.shape)}"
            )


def expect_number(op: str, **numbers: object) -> None:
    """Every argument is a finite Python number (not a tensor: that would cost a device sync)."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)):
            raise TypeError(f"{op}: {name} must be a float, got {type(number).__name__}")
        if not -math.inf < number < math.inf:  # math.isfinite cannot be traced with symbols
            raise ValueError(f"{op}: {name} must be finite, got {number}")


def common_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype: autocast's where it is on (float64 stays), else the promoted one.

    Lazily negated or conjugated views are resolved, so that kernels can read memory as it is.
    """
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[0].device.type
    # the meta device has no autocast of its own, and torch refuses to be asked
    if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    same = (tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)
    return [tensor.resolve_neg() for tensor in same]
