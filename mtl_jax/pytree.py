"""The annotation of pytrees: jaxtyping's, which strict type checkers call unknown, as ``Any``."""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    PyTree: TypeAlias = Any
else:
    from jaxtyping import PyTree

__all__ = ["PyTree"]
