"""Span search (DAGER): texts from gradients of the first two blocks of a transformer."""

from privfm.attacks.reconstruction.span.attack import SpanSearch

__all__ = ["SpanSearch"]
