"""A progress bar where tqdm is installed, else a line for each piece of work."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, name: str, label: Callable[[T], object] = str) -> Iterator[T]:
    """Yield the items and show how far they are."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _lines(items, total, name, label)
        return
    bar: Any = tqdm(total=total, desc=name, file=sys.stderr)
    for item in items:
        bar.set_postfix_str(str(label(item)))
        yield item
        bar.update()
    bar.close()


def _lines(items: Iterable[T], total: int, name: str, label: Callable[[T], object]) -> Iterator[T]:
    for i, item in enumerate(items, 1):
        print(f"{name} {i}/{total}: {label(item)}", file=sys.stderr, flush=True)
        yield item
