"""Sizes in pixels."""


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """`size` as (height, width): an integer means a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
